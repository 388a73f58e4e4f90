// The AMX wrappers of native/amx.hpp on a processor without AMX: each of their instructions is
// refused, and the handler of that signal decodes it, does what Intel's manual says and goes on.
// Results must be those of ModelTiles, bit for bit. Built and run by test_amx.py.
#include <signal.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../native/amx.hpp"

namespace {

using namespace respike;

struct Trapped {
  bool configured;
  std::uint16_t bytes[8];
  std::uint8_t rows[8];
  std::uint8_t tile[8][16][64];
} amx;

int instructions = 0;

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "%s\n", what);
  _exit(1);
}

void configure(const std::uint8_t* shapes) {
  amx = {};
  require(shapes[0] == 1, "palette");
  for (int i = 1; i < 64; ++i) {
    const bool used = i / 16 == 1 || i / 8 == 6;
    require(used || shapes[i] == 0, "reserved bytes, or more than eight tiles");
  }
  std::memcpy(amx.bytes, shapes + 16, sizeof amx.bytes);
  std::memcpy(amx.rows, shapes + 48, sizeof amx.rows);
  for (int t = 0; t < 8; ++t) require(amx.bytes[t] <= 64 && amx.rows[t] <= 16, "shape");
  amx.configured = true;
}

float number(const std::uint8_t* place) {
  const std::uint32_t bits = std::uint32_t{place[1]} << 24 | std::uint32_t{place[0]} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return std::fpclassify(value) == FP_SUBNORMAL ? 0.0f : value;
}

// c += a times b, by the operands of the manual: pairs of bfloat16, or int8 times uint8.
void dot(int c, int a, int b, bool floats) {
  require(c != a && a != b && c != b, "one tile twice");
  require(amx.bytes[a] / 4 == amx.rows[b] && amx.rows[c] == amx.rows[a] &&
              amx.bytes[c] == amx.bytes[b],
          "shapes do not fit");
  for (int i = 0; i < 16 * 16; ++i) {
    std::uint8_t* sum = amx.tile[c][i / 16] + i % 16 * 4;
    float part[2] = {}, real;
    std::int32_t integer;
    std::memcpy(&real, sum, 4);
    std::memcpy(&integer, sum, 4);
    for (int k = 0; k < amx.bytes[a]; ++k) {
      const std::uint8_t* x = amx.tile[a][i / 16] + k;
      const std::uint8_t* w = amx.tile[b][k / 4] + i % 16 * 4 + k % 4;
      if (!floats) integer += static_cast<std::int8_t>(*x) * *w;
      else if (k % 2 == 0) part[k / 2 % 2] = std::fma(number(x), number(w), part[k / 2 % 2]);
    }
    real += part[0] + part[1];
    if (floats) std::memcpy(sum, &real, 4);
    else std::memcpy(sum, &integer, 4);
  }
}

// A VEX instruction of three bytes and opcode, ModRM, SIB and a displacement.
void step(int, siginfo_t*, void* context) {
  constexpr int order[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                           REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  greg_t* reg = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const auto* code = reinterpret_cast<const std::uint8_t*>(reg[REG_RIP]);
  const int opcode = code[3], mod = code[4] >> 6, first = code[4] >> 3 & 7, rm = code[4] & 7;
  require(code[0] == 0xc4 && (code[1] & 31) == 2 && (code[2] & 0x84) == 0, "no instruction of AMX");
  const int prefix = code[2] & 3, base = rm == 4 ? code[5] & 7 : rm;
  require(mod == 3 || mod != 0 || base != 5, "an address that is not decoded here");
  const int high = code[1] & 0x20 ? 0 : 8, index = (code[5] >> 3 & 7) | (code[1] & 0x40 ? 0 : 8);
  std::uint8_t* memory = nullptr;
  std::int64_t stride = 0, length = 5;
  if (mod != 3) {
    memory = reinterpret_cast<std::uint8_t*>(reg[order[base | high]]);
    if (rm == 4 && index != 4) stride = reg[order[index]] << (code[5] >> 6);
    length += rm == 4;
    std::int32_t far = 0;
    if (mod == 2) std::memcpy(&far, code + length, 4);
    memory += mod == 1 ? static_cast<std::int8_t>(code[length]) : far;
    length += mod == 1 ? 1 : mod == 2 ? 4 : 0;
  }
  constexpr int none = 0, f3 = 2, f2 = 3;
  const bool config = opcode == 0x49 && prefix == none && mod != 3;
  require(config || amx.configured, "tiles without a configuration");
  if (config) configure(memory + stride);
  else if (opcode == 0x49 && prefix == none) amx.configured = false;
  else if (opcode == 0x49 && prefix == f2) std::memset(amx.tile[first], 0, sizeof amx.tile[first]);
  else if (opcode == 0x4b && (prefix == f2 || prefix == f3)) {
    for (int i = 0; i < amx.rows[first]; ++i, memory += stride) {
      if (prefix == f2) std::memcpy(amx.tile[first][i], memory, amx.bytes[first]);
      else std::memcpy(memory, amx.tile[first][i], amx.bytes[first]);
    }
  } else if (prefix == f3 && (opcode == 0x5c || opcode == 0x5e)) {
    dot(first, rm, 15 - (code[2] >> 3 & 15), opcode == 0x5c);
  } else {
    require(false, "an instruction that is not decoded here");
  }
  ++instructions;
  reg[REG_RIP] += length;
}

template <class Tiles>
RESPIKE_AMX void multiply(std::int64_t depth, const std::uint8_t* x, std::int64_t stride,
                          std::int64_t rows, std::int64_t bytes, const std::uint8_t* panel,
                          std::uint8_t* out) {
  Tiles tiles(depth);
  multiply_tiles(tiles, x, stride, rows, bytes, panel, out);
}

template <class X>
void compare(std::int64_t depth, std::int64_t rows, std::int64_t bytes) {
  constexpr std::int64_t stride = 203, out_bytes = 16 * 256;
  std::vector<std::uint8_t> x(static_cast<std::size_t>((rows - 1) * stride + bytes));
  std::vector<std::uint8_t> panel(64 * 256), got(out_bytes, 1), expected(out_bytes, 2);
  // Upper bytes of bfloat16 are 0x3c to 0x3f, or with a sign.
  for (auto* bytes_of : {&x, &panel}) {
    for (auto& byte : *bytes_of) byte = static_cast<std::uint8_t>(std::rand() >> 7);
    if (!std::is_same_v<X, bf16>) continue;
    for (std::size_t i = 0; i < bytes_of->size(); ++i) {
      const std::size_t in_row = bytes_of == &x ? i % stride : i;
      std::uint8_t& byte = (*bytes_of)[i];
      if (in_row % 2 == 1) byte = static_cast<std::uint8_t>((byte & 0x83) | 0x3c);
    }
  }
  multiply<HardwareTiles<X>>(depth, x.data(), stride, rows, bytes, panel.data(), got.data());
  multiply<ModelTiles<X>>(depth, x.data(), stride, rows, bytes, panel.data(), expected.data());
  require(!amx.configured, "tiles were not released");
  require(got == expected, "other bits than the model's");
}

}  // namespace

int main() {
  struct sigaction action = {};
  action.sa_sigaction = step;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, nullptr);
  for (const std::int64_t rows : {1, 15, 16, 17}) {
    for (const std::int64_t bytes : {4, 32, 60, 64, 68, 200}) {
      compare<bf16>(64, rows, bytes);
      compare<std::int8_t>(32, rows, bytes);
      compare<std::int8_t>(64, rows, bytes);
    }
  }
  std::printf("%d instructions\n", instructions);
}
