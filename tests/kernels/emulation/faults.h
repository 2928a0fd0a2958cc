// Little kernels with a fault each, and the same without: what the machine must notice, and what it must not.
#pragma once

#include <array>
#include <vector>

namespace torchintro::fuzz {

// What the program must be compiled with for a fault to be noticed.
enum class Needs { Nothing, AddressSanitizer, NoAddressSanitizer, Races };

struct Fault {
  const char* name;
  Needs needs;
  bool (*run)(bool faulty); // whether the result is right; the machine's Error passes through
};

std::vector<Fault> faults();

// A (16, 16) times B (16, 8), both in rows, of bfloat16 numbers, by the warp's matrix instructions. B's parts come
// from B's columns in shared memory, or from its rows, transposed by the load or in the registers.
enum class From { Columns, RowsByLoad, RowsInRegisters };
using Product = std::array<float, 16 * 8>;
Product multiply(const std::array<float, 16 * 16>& a, const std::array<float, 16 * 8>& b, From from);

// Every float that `values` has, rounded to 16 bits and back.
std::vector<float> round_to_bfloat16(const std::vector<float>& values);
std::vector<float> round_to_float16(const std::vector<float>& values);

} // namespace torchintro::fuzz
