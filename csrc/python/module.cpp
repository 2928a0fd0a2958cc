// torchintro._C: what was built. It is not linked to torch, so that it imports under any torch and can say which is needed.
#include "cpu/kernels/level.h"
#include "cpu/kernels/matrix_route.h"

#include <pybind11/pybind11.h>

#include <string>

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCHINTRO_TORCH_VERSION;
  info["cuda"] = TORCHINTRO_CUDA_VERSION;
  info["cuda_architectures"] = TORCHINTRO_CUDA_ARCHITECTURES;
  info["compiler"] = compiler();
  info["cxx_standard"] = static_cast<long>(__cplusplus);
  return info;
}

} // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of torchintro's operator library.";
  m.def(
      "build_info",
      &build_info,
      "The torch and CUDA versions built against ('' without CUDA), the CUDA architectures, the compiler.");
  m.def(
      "cpu_level",
      [] { return torchintro::cpu::level_name(torchintro::cpu::active_level()); },
      "The instruction set that the CPU kernels use: 'baseline', 'avx2' or 'avx512'.");
  m.def(
      "matrix_route",
      [] { return torchintro::cpu::matrix_route_name(torchintro::cpu::active_matrix_route()); },
      "The library that makes float32 matrix products for many outputs: 'blas' or 'onednn'.");
}
