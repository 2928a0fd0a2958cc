// A warp's shuffles and matrix instructions. Register layouts as in the PTX ISA, for mma.m16n8k16 and ldmatrix: lane l
// is thread t = l % 4 of group g = l / 4.
#include "cuda_bf16.h"
#include "machine.h"
#include "races.h"

namespace torchintro::emulation {
namespace {

float low_half(uint32_t pair) {
  return __bfloat162float({static_cast<unsigned short>(pair)});
}
float high_half(uint32_t pair) {
  return __bfloat162float({static_cast<unsigned short>(pair >> 16)});
}

struct Shuffle {
  uint64_t value;
  int source;
  uint64_t result;
};

void perform_shuffle(void* const* lanes) {
  for (int lane = 0; lane < kWarp; ++lane) {
    if (auto* mine = static_cast<Shuffle*>(lanes[lane])) {
      const auto* source = static_cast<const Shuffle*>(lanes[mine->source % kWarp]);
      mine->result = source == nullptr ? ~uint64_t{0} : source->value; // undefined where no lane of the mask gives it
    }
  }
}

struct Load {
  const void* row;
  bool transposed;
  uint32_t* parts;
};

void perform_load(void* const* lanes) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t elements[8][8]; // [row][column]
    for (int row = 0; row < 8; ++row) {
      std::memcpy(elements[row], static_cast<const Load*>(lanes[matrix * 8 + row])->row, sizeof elements[row]);
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      const auto* load = static_cast<const Load*>(lanes[lane]);
      const int g = lane / 4;
      const int t = lane % 4;
      const uint32_t low = load->transposed ? elements[2 * t][g] : elements[g][2 * t];
      const uint32_t high = load->transposed ? elements[2 * t + 1][g] : elements[g][2 * t + 1];
      load->parts[matrix] = low | high << 16;
    }
  }
}

void perform_transpose(void* const* lanes) {
  uint16_t elements[8][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const uint32_t part = *static_cast<const uint32_t*>(lanes[lane]);
    elements[lane / 4][lane % 4 * 2] = static_cast<uint16_t>(part);
    elements[lane / 4][lane % 4 * 2 + 1] = static_cast<uint16_t>(part >> 16);
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const uint32_t low = elements[lane % 4 * 2][lane / 4];
    const uint32_t high = elements[lane % 4 * 2 + 1][lane / 4];
    *static_cast<uint32_t*>(lanes[lane]) = low | high << 16;
  }
}

struct Product {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

// Sums in float, along k in rising order. A GPU adds in an order, and with a rounding, that are not documented.
void perform_product(void* const* lanes) {
  float a[16][16]; // [row][k]
  float b[8][16]; // [column][k]
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto* product = static_cast<const Product*>(lanes[lane]);
    const int g = lane / 4;
    const int k = lane % 4 * 2;
    for (int part = 0; part < 4; ++part) {
      const int row = g + part % 2 * 8;
      a[row][part / 2 * 8 + k] = low_half(product->a[part]);
      a[row][part / 2 * 8 + k + 1] = high_half(product->a[part]);
    }
    for (int part = 0; part < 2; ++part) {
      b[g][part * 8 + k] = low_half(product->b[part]);
      b[g][part * 8 + k + 1] = high_half(product->b[part]);
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto* product = static_cast<const Product*>(lanes[lane]);
    for (int part = 0; part < 4; ++part) {
      const int row = lane / 4 + part / 2 * 8;
      const int column = lane % 4 * 2 + part % 2;
      float sum = product->c[part];
      for (int k = 0; k < 16; ++k) {
        sum += a[row][k] * b[column][k];
      }
      product->c[part] = sum;
    }
  }
}

} // namespace

uint64_t shuffle(const char* name, uint32_t mask, uint64_t value, int source, Place place) {
  Shuffle mine{value, source, 0};
  collective(name, mask, &mine, perform_shuffle, place);
  return mine.result;
}

void load_matrices(uint32_t (&parts)[4], const void* row, bool transposed, Place place) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0 || !is_shared(row)) {
    fail("load_matrices of " + place_text(place) + ": a row does not lie at a multiple of 16 bytes in shared memory");
  }
  note_read(row, 16, __builtin_return_address(0));
  Load mine{row, transposed, parts};
  collective(transposed ? "load_matrices_transposed" : "load_matrices", kAllLanes, &mine, perform_load, place);
}

uint32_t transpose_matrix(uint32_t part, Place place) {
  collective("transpose_matrix", kAllLanes, &part, perform_transpose, place);
  return part;
}

void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Place place) {
  Product mine{c, a, {b0, b1}};
  collective("multiply_add", kAllLanes, &mine, perform_product, place);
}

} // namespace torchintro::emulation
