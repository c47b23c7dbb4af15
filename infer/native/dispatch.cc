#include "dispatch.h"

#include <atomic>
#include <cstring>
#include <string>
#include <vector>

namespace falcon {
namespace {

// A set of instructions by its name: kernels for rows, and matrix products if it has any.
struct Set {
  const char* name;
  const Kernels* kernels;
  const Products* products;
};

#if defined(__aarch64__)
constexpr const char* kPlainName = "neon";
#else
constexpr const char* kPlainName = "plain";
#endif

// Chosen by name only: the plain kernels, and matrix products in ordinary loops, slow, that do what AMX does.
const Set kStandIn{"plain_tiles", &kPlain, &plain_tiles::kProducts};

const std::vector<Set>& available() {
  static const std::vector<Set> sets = [] {
    std::vector<Set> out;  // best first
#if defined(__x86_64__)
    if (kAvx512Bf16.supported() && amx::usable()) out.push_back({"amx", &kAvx512Bf16, &amx::kProducts});
    if (kAvx512Bf16.supported()) out.push_back({"avx512_bf16", &kAvx512Bf16, &avx512_bf16::kProducts});
    if (kAvx512Vnni.supported()) out.push_back({"avx512_vnni", &kAvx512Vnni, &avx512_vnni::kProducts});
    if (kAvx512.supported()) out.push_back({"avx512", &kAvx512, nullptr});
    if (kAvx2.supported()) out.push_back({"avx2", &kAvx2, nullptr});
#endif
    out.push_back({kPlainName, &kPlain, nullptr});
    return out;
  }();
  return sets;
}

std::atomic<const Set*>& chosen() {
  static std::atomic<const Set*> set{&available().front()};
  return set;
}

}  // namespace

const Kernels& kernels() { return *chosen().load()->kernels; }

const Products* products() { return chosen().load()->products; }

}  // namespace falcon

// Version of the calls' arguments and results. infer/weights/library.py has the same number and refuses a library with another one.
// Increase both with every change.
extern "C" int falcon_interface() { return 6; }

// Names of the instruction sets that this CPU has, best first, separated by commas.
extern "C" const char* falcon_instruction_sets() {
  static const std::string names = [] {
    std::string out;
    for (const falcon::Set& set : falcon::available()) out += (out.empty() ? "" : ",") + std::string(set.name);
    return out;
  }();
  return names.c_str();
}

extern "C" const char* falcon_instruction_set() { return falcon::chosen().load()->name; }

// Whether the instruction set in use has a matrix product with rows in elements of a type of the given name; see Products::has.
extern "C" bool falcon_has_product(const char* format, bool transposed) {
  const falcon::Products* p = falcon::products();
  const char* const names[] = {"f32", "bf16", "f16", "int8", "int4"};
  for (int f = 0; p && f < falcon::kFormats; ++f)
    if (!std::strcmp(format, names[f])) return p->has(f, transposed);
  return false;
}

// Uses the named instruction set from now on; false if this CPU lacks it.
extern "C" bool falcon_use_instruction_set(const char* name) {
  for (const falcon::Set& set : falcon::available())
    if (!std::strcmp(set.name, name)) {
      falcon::chosen() = &set;
      return true;
    }
  if (std::strcmp(falcon::kStandIn.name, name)) return false;
  falcon::chosen() = &falcon::kStandIn;
  return true;
}
