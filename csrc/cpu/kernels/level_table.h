// The level's kernels by dtype, the last of what a level's file includes.
namespace torchintro::cpu::TORCHINTRO_LEVEL {

template <typename T, typename U>
constexpr Kernels kernels_of{few_outputs<T, U>, residual<T, U>, add_up<T>, moments<T>, row_products};

Kernels find(DType input, DType target) {
  switch (input) {
    case DType::Float64:
      return kernels_of<double, double>;
    case DType::Float32:
      return kernels_of<float, float>;
    case DType::BFloat16:
      return target == DType::Float32 ? kernels_of<bfloat16, float> : kernels_of<bfloat16, bfloat16>;
    case DType::Float16:
      return target == DType::Float32 ? kernels_of<float16, float> : kernels_of<float16, float16>;
  }
  return {};
}

} // namespace torchintro::cpu::TORCHINTRO_LEVEL
