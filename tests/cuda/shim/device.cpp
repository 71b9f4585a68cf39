// The host side of kernels/device.cuh: tensor cores, f16 conversion, asynchronous copies. Knows nothing of how threads take turns.
#include "../../../kernels/device.cuh"

#include "block.h"

namespace {

// A thread's fragments. The halves of a are the first two registers alone where k is 8 long, and that of b the first.
struct Fragments {
    float *c;
    const uint32_t *a;
    const uint32_t *b;
};

uint16_t half_of(uint32_t pair, unsigned which) { return static_cast<uint16_t>(pair >> 16 * which); }

// c += a b, rows and columns as their fragments say: K values of k.
template <unsigned K>
void multiply(unsigned, void *const *brought) {
    float a[16][K], b[K][8];
    for (unsigned lane = 0; lane < 32; lane++) {
        const Fragments &own = *static_cast<const Fragments *>(brought[lane]);
        const unsigned g = lane / 4, t = lane % 4;
        for (unsigned i = 0; i < K / 8; i++)
            for (unsigned j = 0; j < 2; j++) {
                const unsigned k = 8 * i + 2 * t + j;
                a[g][k] = skv_half_to_float(half_of(own.a[2 * i], j));
                a[g + 8][k] = skv_half_to_float(half_of(own.a[2 * i + 1], j));
                b[k][g] = skv_half_to_float(half_of(own.b[i], j));
            }
    }
    for (unsigned lane = 0; lane < 32; lane++) {
        const Fragments &own = *static_cast<const Fragments *>(brought[lane]);
        const unsigned g = lane / 4, t = lane % 4;
        for (unsigned i = 0; i < 4; i++)
            for (unsigned k = 0; k < K; k++)
                own.c[i] += a[g + i / 2 * 8][k] * b[k][2 * t + i % 2];
    }
}

float float_of(uint32_t bits) { return shim::same_bits<float>(bits); }
uint32_t bits_of(float x) { return shim::same_bits<uint32_t>(x); }

bool aligned(const void *address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

} // namespace

void skv_mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], shim::Site site) {
    Fragments own{c, a, b};
    shim::meet({"skv_mma", shim::whole_warp, site}, &own, multiply<16>);
}

void skv_mma_k8(float (&c)[4], const uint32_t (&a)[2], uint32_t b, shim::Site site) {
    Fragments own{c, a, &b};
    shim::meet({"skv_mma_k8", shim::whole_warp, site}, &own, multiply<8>);
}

uint32_t skv_pack_half(float low, float high) {
    return skv_float_to_half(low) | static_cast<uint32_t>(skv_float_to_half(high)) << 16;
}

float skv_half_to_float(uint16_t half) {
    const uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
    if (magnitude > 0x7c00)
        return float_of(0x7fffffff);
    // Exponents differ by 112. The product is exact, subnormals included.
    const float x = float_of(magnitude << 13) * 0x1p112f;
    return float_of(sign | (magnitude == 0x7c00 ? 0x7f800000 : bits_of(x)));
}

uint16_t skv_float_to_half(float x) {
    const uint32_t sign = bits_of(x) >> 16 & 0x8000, magnitude = bits_of(x) & 0x7fffffff;
    uint32_t half;
    if (magnitude > 0x7f800000)
        return 0x7fff;
    if (magnitude >= 0x477ff000) // from 65520 on the nearest is infinite
        half = 0x7c00;
    else if (magnitude < 0x38800000) // subnormal: next to 0.5 the last place of an f32 is an f16's smallest step
        half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
    else // 13 bits fewer; an odd last place rounds up from the tie
        half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    return static_cast<uint16_t>(sign | half);
}

// Until it is waited for, what is copied is not there, nor what was there before.
void skv_copy_async_16(void *shared, const void *global) {
    if (!aligned(shared) || !aligned(global))
        shim::fail("skv_copy_async_16 from %p to %p: not aligned to 16 bytes", global, shared);
    unsigned char read_now[16];
    memcpy(read_now, global, sizeof read_now);
    memset(shared, 0xff, sizeof read_now);
    shim::copies().begun.push_back({shared, global});
}

void skv_copy_async_commit() { shim::copies().committed = shim::copies().begun.size(); }

void skv_copy_async_wait_all() {
    shim::Copies &copies = shim::copies();
    for (size_t i = 0; i < copies.committed; i++)
        memcpy(copies.begun[i].shared, copies.begun[i].global, 16);
    copies.begun.erase(copies.begun.begin(), copies.begun.begin() + static_cast<std::ptrdiff_t>(copies.committed));
    copies.committed = 0;
}

float skv_exp2(float x) {
    const float y = exp2f(x);
    return y < FLT_MIN ? 0.0f : y;
}
