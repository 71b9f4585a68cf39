// What more than one kernel computes: over the lanes of a warp, and the angles of a rope. Must not know of what.
#pragma once

#include "device.cuh"

namespace {

constexpr float LOG2_E = 1.44269504f;
constexpr double PI = 3.14159265358979323846;

__device__ float sum_of_warp(float x) {
    for (int step = 16; step > 0; step /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

__device__ float largest_of_warp(float x) {
    for (int step = 16; step > 0; step /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}

/// By how much a pair is turned that turns by `omega` radians a position.
__device__ void angle_of(double turn, double omega, float &cos, float &sin) {
    const double angle = turn * omega * (1.0 / PI);
    // A turn more or less changes nothing, and what is left is as precise as f32 can be.
    sincospif(float(angle - 2.0 * rint(0.5 * angle)), &sin, &cos);
}

} // namespace
