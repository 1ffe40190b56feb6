// Prints every function of math.h and every estimator's terms on a grid, as `name term type s ref value` in
// hexadecimal floats: tests/test_emitted.py compares them with the Python rows and with float64.
#include <cmath>
#include <cstdio>
#include <initializer_list>

#include "dimkern/estimators.h"

namespace {

template <class T>
void print(const char* name, const char* term, T s, T ref, T value) {
  std::printf("%s %s %s %a %a %a\n", name, term, sizeof(T) == 4 ? "float32" : "float64", static_cast<double>(s),
              static_cast<double>(ref), static_cast<double>(value));
}

template <class T>
void print_functions(T x) {
  print("math", "exp", x, T(0), dimkern::exp(x));
  print("math", "sigmoid", x, T(0), dimkern::sigmoid(x));
  print("math", "softplus", x, T(0), dimkern::softplus(x));
}

template <class T>
void print_terms(const char* name, T s, T ref) {
  dimkern::with_estimator(name, [&](auto estimator) {
    print(name, "f", s, ref, estimator.f(s));
    print(name, "df", s, ref, estimator.df(s));
    print(name, "psi", s, ref, estimator.psi(s, ref));
    print(name, "phi", s, ref, estimator.phi(s, ref));
  });
}

template <class T>
void print_all(int names, char** name) {
  for (int i = -2000; i <= 2000; ++i) print_functions(T(i) * T(0.37));
  for (int i = -200; i <= 200; ++i) print_functions(T(i) * T(0.00491));
  for (T x : {T(1e4), T(-1e4), T(INFINITY), T(-INFINITY), T(NAN), T(0), T(1e-30), T(-1e-30)}) print_functions(x);
  for (int k = 0; k < names; ++k) {
    for (int i = -40; i <= 40; ++i) print_terms(name[k], T(i) * T(0.43), T(i % 7) * T(0.31));
  }
}

}  // namespace

int main(int argc, char** argv) {
  print_all<float>(argc - 1, argv + 1);
  print_all<double>(argc - 1, argv + 1);
}
