// What programs under tests/cuda fail with. Knows nothing of the shim.
#pragma once

#include <stdio.h>
#include <stdlib.h>

// Not assert(): it must count in every build.
#define CHECK(condition)                                                                                                               \
    do {                                                                                                                               \
        if (!(condition)) {                                                                                                            \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                                                            \
            exit(1);                                                                                                                   \
        }                                                                                                                              \
    } while (0)

#define EQUAL(a, b)                                                                                                                    \
    do {                                                                                                                               \
        const double a_ = static_cast<double>(a), b_ = static_cast<double>(b);                                                         \
        if (!(a_ == b_)) {                                                                                                             \
            fprintf(stderr, "%s:%d: %s is %.9g, %s is %.9g\n", __FILE__, __LINE__, #a, a_, #b, b_);                                    \
            exit(1);                                                                                                                   \
        }                                                                                                                              \
    } while (0)
