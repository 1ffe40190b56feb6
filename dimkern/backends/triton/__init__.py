"""The map step in Triton: for now the scalar maths of the estimators, which the kernels will use as their epilogue."""
