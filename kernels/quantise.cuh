// Which code and which gain stand for a number, and how the codes of a tile's rows lie together: layout::quant, layout::gain and simd::encode of the
// library. A warp has the 64 rows of a coefficient, lane `i` rows `i` and `i + 32`. Knows nothing of forms, bases or tiles.
#pragma once

#include "form.cuh"

namespace {

/// The least root mean square of a row's coefficients: none is divided by less.
constexpr float LEAST_SCALE = 1e-6f;
/// Least width at which codes make up for what the byte cannot say of a gain: they are chosen for the gain as it is stored.
constexpr int FINE_WIDTH = 6;

/// Tables in shared memory; kernels/layer.h says what they hold.
struct Tables {
    const float *gains, *least_gains, *positive, *bounds;
    float cubic[2];
};

/// The byte of a gain: 0 for one too small to matter.
__device__ int gain_code(const Tables &tables, float gain) {
    int code = 0;
    for (int step = 128; step > 0; step /= 2)
        if (gain >= tables.least_gains[code + step])
            code += step;
    return code;
}

/// The magnitude of the code of 8 bits that is nearest to one.
__device__ int nearest_8(const Tables &tables, float magnitude) {
    int code = 0;
    UNROLL
    for (int step = 64; step > 0; step /= 2) {
        // Half-way between the cubics of two whole numbers around `h`.
        const float h = float(code + step) - 0.5f;
        const float bound = h * ((tables.cubic[0] + 0.75f * tables.cubic[1]) + tables.cubic[1] * (h * h));
        code += magnitude >= bound ? step : 0;
    }
    return code;
}

/// The number of the positive level of so many bits, up to 6, that is nearest to a magnitude.
__device__ int nearest(const Tables &tables, int width, float magnitude) {
    const int half = 1 << (width - 1);
    int above = 0;
    for (int step = half / 2; step > 0; step /= 2)
        if (magnitude >= tables.bounds[half + above + step])
            above += step;
    return above;
}

/// The level of a code of 8 bits, signed.
__device__ float cubic(const Tables &tables, float code) {
    return code * (tables.cubic[0] + tables.cubic[1] * code * code);
}

/// The level nearest to `x`.
__device__ float nearest_level(const Tables &tables, int width, float x) {
    const float magnitude = fabsf(x);
    const float level = width == 8 ? cubic(tables, float(nearest_8(tables, magnitude))) : tables.positive[(1 << (width - 1)) + nearest(tables, width, magnitude)];
    return x >= 0.0f ? level : -level;
}

/// The code of that level.
__device__ uint32_t nearest_code(const Tables &tables, int width, float x) {
    const float magnitude = fabsf(x);
    if (width == 8) {
        const int code = nearest_8(tables, magnitude);
        return uint32_t(x >= 0.0f ? code : -code) & 255;
    }
    const int half = 1 << (width - 1), above = nearest(tables, width, magnitude);
    return uint32_t(x >= 0.0f ? half + above : half - 1 - above);
}

/// What a code stands for.
__device__ float level_of(const Tables &tables, int width, uint32_t code) {
    if (width == 8)
        return cubic(tables, float(int8_t(code)));
    const int half = 1 << (width - 1), above = int(code) - half;
    return above >= 0 ? tables.positive[half + above] : -tables.positive[half - 1 - above];
}

/// Write the codes of a coefficient, `low` and `high` those of a lane's two rows. All lanes of a warp.
__device__ void pack(uint8_t *packed, int width, uint32_t low, uint32_t high, int lane) {
    if (width == 8) {
        packed[lane] = uint8_t(low);
        packed[lane + 32] = uint8_t(high);
        return;
    }
    if (width & 4) {
        packed[lane] = uint8_t((low & 15) | (high & 15) << 4);
        packed += 32;
        low >>= 4;
        high >>= 4;
    }
    if (width & 2) {
        const uint32_t own = (low & 3) | (high & 3) << 4, other = __shfl_xor_sync(0xffffffffu, own, 16);
        if (lane < 16)
            packed[lane] = uint8_t(own | other << 2);
        packed += 16;
        low >>= 2;
        high >>= 2;
    }
    if (width & 1) {
        const uint32_t lows = __ballot_sync(0xffffffffu, low & 1), highs = __ballot_sync(0xffffffffu, high & 1);
        if (lane < 8)
            packed[lane] = uint8_t((lane < 4 ? lows : highs) >> (8 * (lane % 4)));
    }
}

/// Byte within a plane of 1, 2, 4 or 8 bits, and shift in it, of a row.
__device__ void spot(int bits, int row, int &byte, int &up) {
    const int bytes = 8 * bits;
    byte = bits == 1 ? row / 8 : row % bytes;
    up = bits == 1 ? row % 8 : row / bytes * bits;
}

/// Read the code of one row.
__device__ uint32_t code_at(const uint8_t *packed, int width, int row) {
    uint32_t code = 0;
    int shift = 0;
    for (int bits = 8; bits > 0; bits /= 2) {
        if ((width & bits) == 0)
            continue;
        int byte, up;
        spot(bits, row, byte, up);
        code |= (uint32_t(packed[byte]) >> up & ((1u << bits) - 1)) << shift;
        packed += 8 * bits;
        shift += bits;
    }
    return code;
}

/// Write the code of one row, and leave those of others.
__device__ void set_code(uint8_t *packed, int width, int row, uint32_t code) {
    for (int bits = 8; bits > 0; bits /= 2) {
        if ((width & bits) == 0)
            continue;
        const uint32_t mask = (1u << bits) - 1;
        int byte, up;
        spot(bits, row, byte, up);
        packed[byte] = uint8_t((packed[byte] & ~(mask << up)) | (code & mask) << up);
        packed += 8 * bits;
        code >>= bits;
    }
}

} // namespace
