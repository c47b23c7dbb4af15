#include "dispatch.h"

#include <atomic>
#include <cstring>
#include <string>
#include <vector>

namespace falcon {
namespace {

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> out;  // best first
#if defined(__x86_64__)
  for (const Kernels* k : {&kAvx512Bf16, &kAvx512Vnni, &kAvx512, &kAvx2})
    if (k->supported()) out.push_back(k);
#endif
  out.push_back(&kPlain);
  return out;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> kernels{available().front()};
  return kernels;
}

}  // namespace

const Kernels& kernels() { return *chosen().load(); }

const Products* products() {
#if defined(__x86_64__)
  if (&kernels() == &kAvx512Bf16) return &avx512_bf16::kProducts;
#endif
  return nullptr;
}

}  // namespace falcon

// Version of the calls' arguments and results. infer/weights/library.py has the same number and refuses a library with another one.
// Increase both with every change.
extern "C" int falcon_interface() { return 4; }

// Names of the instruction sets that this CPU has, best first, separated by commas.
extern "C" const char* falcon_instruction_sets() {
  static const std::string names = [] {
    std::string out;
    for (const falcon::Kernels* k : falcon::available()) out += (out.empty() ? "" : ",") + std::string(k->name);
    return out;
  }();
  return names.c_str();
}

extern "C" const char* falcon_instruction_set() { return falcon::kernels().name; }

// Whether the instruction set in use has matrix products in bf16.
extern "C" bool falcon_has_products() { return falcon::products() != nullptr; }

// Uses the named instruction set from now on; false if this CPU lacks it.
extern "C" bool falcon_use_instruction_set(const char* name) {
  for (const falcon::Kernels* k : falcon::available())
    if (!std::strcmp(k->name, name)) {
      falcon::chosen() = k;
      return true;
    }
  return false;
}
