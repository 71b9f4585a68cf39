// Codes of coefficients, 64 rows each, and what they stand for: layout::quant. Must not know whose coefficients they are, nor where they lie in a tile.
#pragma once

#include "form.cuh"

namespace {

/// The lowest four bits, each in a byte.
__device__ uint32_t spread(uint32_t bits) {
    return ((bits & 15) * 0x00204081u) & 0x01010101u;
}

__device__ uint32_t word(const uint8_t *bytes) {
    return *reinterpret_cast<const uint32_t *>(bytes);
}

/// Codes of a coefficient of rows 4g to 4g + 3, and of those 32 further: a byte each.
template <int W> __device__ __forceinline__ void unpack(const uint8_t *packed, int g, uint32_t (&codes)[2]) {
    if (W == 8) {
        codes[0] = word(packed + 4 * g);
        codes[1] = word(packed + 32 + 4 * g);
        return;
    }
    codes[0] = codes[1] = 0;
    if (W & 4) {
        const uint32_t nibbles = word(packed + 4 * g);
        codes[0] = nibbles & 0x0f0f0f0fu;
        codes[1] = nibbles >> 4 & 0x0f0f0f0fu;
        packed += 32;
    }
    if (W & 2) {
        const uint32_t pairs = word(packed + 4 * (g & 3)) >> (2 * (g >> 2));
        codes[0] |= (pairs & 0x03030303u) << (W & 4);
        codes[1] |= (pairs >> 4 & 0x03030303u) << (W & 4);
        packed += 16;
    }
    if (W & 1) {
        const int up = 4 * (g & 1);
        codes[0] |= spread(packed[g >> 1] >> up) << (W & 6);
        codes[1] |= spread(packed[4 + (g >> 1)] >> up) << (W & 6);
    }
}

/// The level of a code in the lowest byte, in units, as f16.
template <int W> __device__ __forceinline__ uint32_t level(const SkvLayer &l, const uint16_t *levels, uint32_t code) {
    if (W == 8) {
        const float c = float(int8_t(code & 0xff));
        return skv_float_to_half(c * (l.cubic[0] + l.cubic[1] * c * c));
    }
    return levels[(1 << W) + (code & 0xff)];
}

/// What levels of width `W` are in units of.
template <int W> __device__ float step_of(const SkvLayer &l) {
    return l.steps[W % 8];
}

/// A residual of a fine row, of one side: a step in f16 and a nibble a coefficient, the second half of them in the upper ones.
struct Residual {
    const uint8_t *bytes;
    int d;

    __device__ float step() const {
        return skv_half_to_float(bytes[0] | bytes[1] << 8);
    }
    /// The level of coefficient `j`, in units.
    __device__ float level(const uint16_t *levels, int j) const {
        const int half = (d + 1) / 2;
        const uint32_t nibble = j < half ? bytes[2 + j] & 15 : bytes[2 + j - half] >> 4;
        return skv_half_to_float(levels[16 + nibble]);
    }
};

} // namespace
