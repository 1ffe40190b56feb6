// Written by kernels/emit.py from dimkern/estimators.py; do not edit.
#pragma once

#include "dimkern/math.h"

namespace dimkern {

enum class Family { pointwise, row_lse, global_lse };

namespace constants {
template <class T> inline constexpr T one = T(1.0);
template <class T> inline constexpr T half = T(0.5);
template <class T> inline constexpr T quarter = T(0.25);
template <class T> inline constexpr T log2 = T(0.6931471805599453);
}  // namespace constants

// van den Oord et al. 2018, eq. 4; Hjelm et al. 2019, eq. 5
struct INFONCE {
  static constexpr const char* name = "infonce";
  static constexpr Family family = Family::row_lse;
  static constexpr bool shares_map = true;  // whether psi and phi are one function
  template <class T>
  static DK_FN T f([[maybe_unused]] T s) { return s; }
  template <class T>
  static DK_FN T df([[maybe_unused]] T s) { constexpr T one = constants::one<T>; return one; }
  template <class T>
  static DK_FN T psi([[maybe_unused]] T s, [[maybe_unused]] T ref) { return exp(s - ref); }
  template <class T>
  static DK_FN T phi([[maybe_unused]] T s, [[maybe_unused]] T ref) { return exp(s - ref); }
};

// Donsker & Varadhan 1983; Belghazi et al. 2018, eq. 10; Hjelm et al. 2019, eq. 2
struct DV {
  static constexpr const char* name = "dv";
  static constexpr Family family = Family::global_lse;
  static constexpr bool shares_map = true;  // whether psi and phi are one function
  template <class T>
  static DK_FN T f([[maybe_unused]] T s) { return s; }
  template <class T>
  static DK_FN T df([[maybe_unused]] T s) { constexpr T one = constants::one<T>; return one; }
  template <class T>
  static DK_FN T psi([[maybe_unused]] T s, [[maybe_unused]] T ref) { return exp(s - ref); }
  template <class T>
  static DK_FN T phi([[maybe_unused]] T s, [[maybe_unused]] T ref) { return exp(s - ref); }
};

// Nowozin et al. 2016, table 6; Hjelm et al. 2019, eq. 4
struct JSD {
  static constexpr const char* name = "jsd";
  static constexpr Family family = Family::pointwise;
  static constexpr bool shares_map = false;  // whether psi and phi are one function
  template <class T>
  static DK_FN T f([[maybe_unused]] T s) { constexpr T log2 = constants::log2<T>; return log2 - softplus(-s); }
  template <class T>
  static DK_FN T df([[maybe_unused]] T s) { return sigmoid(-s); }
  template <class T>
  static DK_FN T psi([[maybe_unused]] T s, [[maybe_unused]] T ref) { constexpr T log2 = constants::log2<T>; return softplus(s) - log2; }
  template <class T>
  static DK_FN T phi([[maybe_unused]] T s, [[maybe_unused]] T ref) { return sigmoid(s); }
};

// Goodfellow et al. 2014; Nowozin et al. 2016, table 6
struct GAN {
  static constexpr const char* name = "gan";
  static constexpr Family family = Family::pointwise;
  static constexpr bool shares_map = false;  // whether psi and phi are one function
  template <class T>
  static DK_FN T f([[maybe_unused]] T s) { return -softplus(-s); }
  template <class T>
  static DK_FN T df([[maybe_unused]] T s) { return sigmoid(-s); }
  template <class T>
  static DK_FN T psi([[maybe_unused]] T s, [[maybe_unused]] T ref) { return softplus(s); }
  template <class T>
  static DK_FN T phi([[maybe_unused]] T s, [[maybe_unused]] T ref) { return sigmoid(s); }
};

// Nguyen, Wainwright & Jordan 2010; Nowozin et al. 2016, table 6
struct KL {
  static constexpr const char* name = "kl";
  static constexpr Family family = Family::pointwise;
  static constexpr bool shares_map = true;  // whether psi and phi are one function
  template <class T>
  static DK_FN T f([[maybe_unused]] T s) { return s; }
  template <class T>
  static DK_FN T df([[maybe_unused]] T s) { constexpr T one = constants::one<T>; return one; }
  template <class T>
  static DK_FN T psi([[maybe_unused]] T s, [[maybe_unused]] T ref) { constexpr T one = constants::one<T>; return exp(s - one); }
  template <class T>
  static DK_FN T phi([[maybe_unused]] T s, [[maybe_unused]] T ref) { constexpr T one = constants::one<T>; return exp(s - one); }
};

// Nowozin et al. 2016, table 6
struct RKL {
  static constexpr const char* name = "rkl";
  static constexpr Family family = Family::pointwise;
  static constexpr bool shares_map = false;  // whether psi and phi are one function
  template <class T>
  static DK_FN T f([[maybe_unused]] T s) { return -exp(-s); }
  template <class T>
  static DK_FN T df([[maybe_unused]] T s) { return exp(-s); }
  template <class T>
  static DK_FN T psi([[maybe_unused]] T s, [[maybe_unused]] T ref) { constexpr T one = constants::one<T>; return s - one; }
  template <class T>
  static DK_FN T phi([[maybe_unused]] T s, [[maybe_unused]] T ref) { constexpr T one = constants::one<T>; return one; }
};

// Nowozin et al. 2016, table 6 (squared Hellinger)
struct H2 {
  static constexpr const char* name = "h2";
  static constexpr Family family = Family::pointwise;
  static constexpr bool shares_map = false;  // whether psi and phi are one function
  template <class T>
  static DK_FN T f([[maybe_unused]] T s) { constexpr T one = constants::one<T>; return one - exp(-s); }
  template <class T>
  static DK_FN T df([[maybe_unused]] T s) { return exp(-s); }
  template <class T>
  static DK_FN T psi([[maybe_unused]] T s, [[maybe_unused]] T ref) { constexpr T one = constants::one<T>; return exp(s) - one; }
  template <class T>
  static DK_FN T phi([[maybe_unused]] T s, [[maybe_unused]] T ref) { return exp(s); }
};

// Nowozin et al. 2016, table 6 (Pearson)
struct X2 {
  static constexpr const char* name = "x2";
  static constexpr Family family = Family::pointwise;
  static constexpr bool shares_map = false;  // whether psi and phi are one function
  template <class T>
  static DK_FN T f([[maybe_unused]] T s) { return s; }
  template <class T>
  static DK_FN T df([[maybe_unused]] T s) { constexpr T one = constants::one<T>; return one; }
  template <class T>
  static DK_FN T psi([[maybe_unused]] T s, [[maybe_unused]] T ref) { constexpr T quarter = constants::quarter<T>; return quarter * s * s + s; }
  template <class T>
  static DK_FN T phi([[maybe_unused]] T s, [[maybe_unused]] T ref) { constexpr T one = constants::one<T>; constexpr T half = constants::half<T>; return half * s + one; }
};

// Arjovsky et al. 2017 (the critic's Lipschitz constraint is the caller's)
struct W1 {
  static constexpr const char* name = "w1";
  static constexpr Family family = Family::pointwise;
  static constexpr bool shares_map = false;  // whether psi and phi are one function
  template <class T>
  static DK_FN T f([[maybe_unused]] T s) { return s; }
  template <class T>
  static DK_FN T df([[maybe_unused]] T s) { constexpr T one = constants::one<T>; return one; }
  template <class T>
  static DK_FN T psi([[maybe_unused]] T s, [[maybe_unused]] T ref) { return s; }
  template <class T>
  static DK_FN T phi([[maybe_unused]] T s, [[maybe_unused]] T ref) { constexpr T one = constants::one<T>; return one; }
};

// Calls visit(Estimator{}) for the estimator of that name; false where there is none.
template <class Visit>
bool with_estimator(const char* name, Visit&& visit) {
  if (same_text(name, INFONCE::name)) return visit(INFONCE{}), true;
  if (same_text(name, DV::name)) return visit(DV{}), true;
  if (same_text(name, JSD::name)) return visit(JSD{}), true;
  if (same_text(name, GAN::name)) return visit(GAN{}), true;
  if (same_text(name, KL::name)) return visit(KL{}), true;
  if (same_text(name, RKL::name)) return visit(RKL{}), true;
  if (same_text(name, H2::name)) return visit(H2{}), true;
  if (same_text(name, X2::name)) return visit(X2{}), true;
  if (same_text(name, W1::name)) return visit(W1{}), true;
  return false;
}

}  // namespace dimkern
