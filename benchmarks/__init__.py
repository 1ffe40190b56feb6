"""What the losses cost beside their peers: `python -m benchmarks.compare --help`.

cases        the shapes and their inputs, one list for every mode
contenders   each way to compute a loss, and the bare matrix products that bound them all
oracle       float64 losses and gradients: the gate that a contender passes before it is timed
measure      interleaved times, peak memory
compare      the command: tables, JSON
plot         the README's pictures, from the committed JSON
group        several processes: scaling measured, many GPUs modelled
test_bench   pytest-benchmark cases of the same contenders
"""
