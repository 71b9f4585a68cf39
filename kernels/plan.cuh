// What a plan looks like, and what attention reads of one (src/cache/plan.rs): which rows there are, in which cells, and by how much queries are turned for them. Must not know what is
// in the rows.
#pragma once

#include "form.cuh"

namespace {

/// Ints of a plan's header, and of a tile in it.
constexpr int PLAN_HEADER = 17, PLAN_TILE = 1 + 2 * TILE;

/// A tile: its number, then cell (below 0: none) and turn of each row.
struct ListedTile {
    const int32_t *ints;

    __device__ int number() const {
        return ints[0];
    }
    __device__ int cell(int row) const {
        return ints[1 + 2 * row];
    }
    __device__ int turn(int row) const {
        return ints[2 + 2 * row];
    }
};

/// Rows come in units: exact ones, those that are stored and then the step's own, 64 to a unit; then tiles.
struct Rows {
    const int32_t *plan, *own, *exact, *tiles;
    int n_own, n_exact, n_tiles;

    __device__ explicit Rows(const int32_t *plan)
        : plan(plan), own(plan + PLAN_HEADER), exact(own + 2 * plan[4]), tiles(exact + 3 * plan[5]), n_own(plan[4]), n_exact(plan[5]), n_tiles(plan[6]) {}

    /// Whether there may be tiles of a kind.
    __device__ bool has(int kind) const {
        return kind == WAITING || (kind < WAITING ? plan[3] >> 1 : plan[3] >> 3) & 1;
    }
    __device__ int all_exact() const {
        return n_exact + n_own;
    }
    __device__ int exact_units() const {
        return (all_exact() + TILE - 1) / TILE;
    }
    __device__ int units() const {
        return exact_units() + n_tiles;
    }
    __device__ ListedTile tile(int unit) const {
        return ListedTile{tiles + int64_t(unit - exact_units()) * PLAN_TILE};
    }
    /// Of exact row `e`, one that is stored.
    __device__ int slot(int e) const {
        return exact[3 * e];
    }
    /// Of any exact row; -1 behind the last.
    __device__ int cell(int e) const {
        return e < n_exact ? exact[3 * e + 1] : e < all_exact() ? own[2 * (e - n_exact)] : -1;
    }
    __device__ int turn(int e) const {
        return e < n_exact ? exact[3 * e + 2] : 0;
    }
};

} // namespace
