#include "cpu/kernels/matrix_route.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace torchintro::cpu {
namespace {

bool is_amd() {
#if defined(__x86_64__)
  unsigned int highest = 0, vendor[3] = {};
  return __get_cpuid(0, &highest, &vendor[0], &vendor[2], &vendor[1]) != 0 &&
      std::memcmp(vendor, "AuthenticAMD", sizeof(vendor)) == 0;
#else
  return false;
#endif
}

MatrixRoute choose_route() {
  const char* wanted = std::getenv("TORCHINTRO_MATRIX_ROUTE");
  if (wanted != nullptr) {
    for (const MatrixRoute route : {MatrixRoute::Blas, MatrixRoute::OneDnn}) {
      if (std::strcmp(wanted, matrix_route_name(route)) == 0) {
        return route;
      }
    }
  }
  return is_amd() ? MatrixRoute::OneDnn : MatrixRoute::Blas;
}

} // namespace

MatrixRoute active_matrix_route() {
  static const MatrixRoute route = choose_route();
  return route;
}

const char* matrix_route_name(MatrixRoute route) {
  return route == MatrixRoute::OneDnn ? "onednn" : "blas";
}

} // namespace torchintro::cpu
