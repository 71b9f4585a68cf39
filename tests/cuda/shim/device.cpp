// The host side of kernels/device.cuh: tensor cores, f16 conversion, asynchronous copies. Knows nothing of how threads take turns.
#include "../../../kernels/device.cuh"

#include "block.h"
#include "races.h"

namespace {

// Of what a kernel calls most: nothing in these functions goes by an index or address that a kernel chose.
#define UNGUARDED __attribute__((no_sanitize("address"), no_sanitize("undefined")))

// Four at a time, as all CPUs have them.
using Words = uint32_t __attribute__((vector_size(16)));
using Floats = float __attribute__((vector_size(16)));

// A thread's fragments: for 8 values of k, the first two registers of a and the first of b.
struct Fragments {
    float *c;
    const uint32_t *a;
    const uint32_t *b;
};

// The f32 of an f16 in the low bits of each word.
UNGUARDED __attribute__((always_inline)) inline Floats widen(Words halves) {
    const Words magnitude = halves & 0x7fff;
    // Exponents differ by 112. The product is exact, subnormals included; infinities and NaNs need the largest exponent.
    const Floats x = reinterpret_cast<Floats>(magnitude << 13) * 0x1p112f;
    const Words special = reinterpret_cast<Words>(magnitude >= 0x7c00) & 0x7f800000;
    return reinterpret_cast<Floats>(reinterpret_cast<Words>(x) | special | (halves & 0x8000) << 16);
}

// The matrices of a warp whole, with halves in pairs of neighbouring k as they come.
template <unsigned K>
struct Matrices {
    alignas(16) uint32_t a[16][K / 2];
    alignas(16) uint32_t b[K / 2][8];
    alignas(16) float c[16][8];

    UNGUARDED void gather(void *const *brought) {
        for (unsigned lane = 0; lane < 32; lane++) {
            const Fragments &own = *static_cast<const Fragments *>(brought[lane]);
            const unsigned g = lane / 4, t = lane % 4;
            for (unsigned i = 0; i < K / 8; i++) {
                a[g][4 * i + t] = own.a[2 * i];
                a[g + 8][4 * i + t] = own.a[2 * i + 1];
                b[4 * i + t][g] = own.b[i];
            }
            memcpy(&c[g][2 * t], own.c, 8);
            memcpy(&c[g + 8][2 * t], own.c + 2, 8);
        }
    }

    // c += a b, k from the first to the last.
    UNGUARDED void multiply() {
        Floats columns[K][2];
        for (unsigned pair = 0; pair < K / 2; pair++)
            for (unsigned i = 0; i < 2; i++) {
                const Words words = load<Words>(&b[pair][4 * i]);
                columns[2 * pair][i] = widen(words & 0xffff);
                columns[2 * pair + 1][i] = widen(words >> 16);
            }
        for (unsigned row = 0; row < 16; row++) {
            Floats low = load<Floats>(&c[row][0]), high = load<Floats>(&c[row][4]);
            for (unsigned i = 0; i < K / 8; i++) {
                const Words words = load<Words>(&a[row][4 * i]);
                const Floats even = widen(words & 0xffff), odd = widen(words >> 16);
                for (unsigned j = 0; j < 4; j++) {
                    const Floats *at = columns[8 * i + 2 * j];
                    low += even[j] * at[0];
                    high += even[j] * at[1];
                    low += odd[j] * at[2];
                    high += odd[j] * at[3];
                }
            }
            memcpy(&c[row][0], &low, sizeof low);
            memcpy(&c[row][4], &high, sizeof high);
        }
    }

    UNGUARDED void scatter(void *const *brought) const {
        for (unsigned lane = 0; lane < 32; lane++) {
            const Fragments &own = *static_cast<const Fragments *>(brought[lane]);
            const unsigned g = lane / 4, t = lane % 4;
            memcpy(own.c, &c[g][2 * t], 8);
            memcpy(own.c + 2, &c[g + 8][2 * t], 8);
        }
    }

private:
    template <class Vector, class Element>
    UNGUARDED __attribute__((always_inline)) static inline Vector load(const Element *from) {
        Vector vector;
        memcpy(&vector, from, sizeof vector);
        return vector;
    }
};

template <unsigned K>
UNGUARDED void multiply(unsigned, void *const *brought) {
    Matrices<K> matrices;
    matrices.gather(brought);
    matrices.multiply();
    matrices.scatter(brought);
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
    shim::touch(shared, 16, true, __builtin_return_address(0));
    unsigned char read_now[16];
    memcpy(read_now, global, sizeof read_now);
    memset(shared, 0xff, sizeof read_now);
    shim::copies().begun.push_back({shared, global});
}

void skv_copy_async_commit() { shim::copies().committed = shim::copies().begun.size(); }

void skv_copy_async_wait_all() {
    shim::Copies &copies = shim::copies();
    for (size_t i = 0; i < copies.committed; i++) {
        shim::touch(copies.begun[i].shared, 16, true, __builtin_return_address(0));
        memcpy(copies.begun[i].shared, copies.begun[i].global, 16);
    }
    copies.begun.erase(copies.begun.begin(), copies.begun.begin() + static_cast<std::ptrdiff_t>(copies.committed));
    copies.committed = 0;
}

float skv_exp2(float x) {
    const float y = exp2f(x);
    return y < FLT_MIN ? 0.0f : y;
}
