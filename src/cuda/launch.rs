//! How an attention call and a step to store are launched: which kernel, in how many blocks, with how much shared memory, and how large the workspace is.
//!
//! All of it follows from shapes, the number of query tokens and the device, never from what is stored: a launch that was captured replays at any
//! fill. Must not know the driver, nor where anything lies.

use super::layer::PAIRS;
use crate::error::{argument, Error, Result};
use crate::layout::{Heads, MAX_QUERIES, TILE};

/// Threads of a block, of the kernels that attend.
pub const THREADS: usize = 128;
/// Threads of a block of the kernel that stores.
pub const STORE_THREADS: usize = 256;
/// Largest head whose rows it codes.
const STORE_MOST: usize = 512;
/// Blocks that a call aims at, for each multiprocessor: one waits for memory while the other computes.
const BLOCKS: usize = 2;
/// Units of rows that a split has at least when a stream is full: fewer would not be worth its start and its place in the workspace.
const LEAST_UNITS: usize = 4;
/// Most splits: what combines them reads all, for every output.
const MOST_SPLITS: usize = 64;
/// Shared memory that a block may have on every device from compute capability 8.0 on.
const SHARED_EVERYWHERE: usize = 99 << 10;
/// Forms that tiles may have, and bytes of one in shared memory.
const KINDS: usize = 7;
const FORM_BYTES: usize = 192;
/// Most blocks of a grid in any direction but the first.
const MOST_BLOCKS: usize = u16::MAX as usize;

/// Units that rows are shared out in when a stream is full: up to 64 exact rows, those of the step, or a tile.
pub fn units(exact: usize, tiles: usize) -> usize {
    exact.div_ceil(TILE).saturating_add(tiles).saturating_add(1)
}

/// One attention call as two launches: attention, and what combines its splits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launch {
    /// Query columns of a block, 8 or 16: which attention kernel.
    pub columns: usize,
    /// Blocks of the attention kernel: splits, blocks of columns, KV heads.
    pub grid: [u32; 3],
    /// Dynamic shared memory of a block of it; the other has none.
    pub shared_bytes: usize,
    /// Blocks of the kernel that combines: one for each query head of each token.
    pub combine_blocks: u32,
    /// Floats of the partial results, `[KV head][query column][split][2 + d_v]`.
    pub workspace_floats: usize,
}

impl Launch {
    /// A call of `n_tokens` query tokens on a layer of these heads, in a geometry of so many [`units`].
    pub fn new(h: &Heads, units: usize, n_tokens: usize, multiprocessors: u32) -> Result<Self> {
        check(h)?;
        if n_tokens == 0 || n_tokens > MAX_QUERIES || multiprocessors == 0 {
            return argument(format!("{n_tokens} query tokens on {multiprocessors} multiprocessors; 1 to {MAX_QUERIES} tokens are possible"));
        }
        let queries = n_tokens.checked_mul(h.group());
        let columns = columns(h, queries.unwrap_or(usize::MAX));
        let fits = |queries: usize| {
            let blocks = queries.div_ceil(columns);
            let side_by_side = blocks.checked_mul(h.n_head_kv)?;
            let splits = splits(units, BLOCKS * multiprocessors as usize / side_by_side);
            let partials = queries.checked_mul(h.n_head_kv)?.checked_mul(splits)?;
            (blocks <= MOST_BLOCKS && h.n_head_kv <= MOST_BLOCKS).then_some(Launch {
                columns,
                grid: [splits as u32, blocks as u32, h.n_head_kv as u32],
                shared_bytes: shared_bytes(h.d_k, h.d_v, columns),
                combine_blocks: i32::try_from(n_tokens.checked_mul(h.n_head)?).ok()? as u32,
                workspace_floats: partials.checked_mul(2 + h.d_v)?,
            })
        };
        queries
            .and_then(fits)
            .ok_or_else(|| Error::Argument(format!("{} query heads of {} KV heads are too many for a launch", h.n_head, h.n_head_kv)))
    }

    /// Splits of the rows.
    pub fn splits(&self) -> u32 {
        self.grid[0]
    }

    /// Bytes of the workspace.
    pub fn workspace_bytes(&self) -> usize {
        self.workspace_floats.saturating_mul(size_of::<f32>())
    }
}

/// Most bytes of the workspace of a call of up to `n_tokens` tokens. Fewer tokens may take more of them, in more splits.
pub fn workspace_bytes(h: &Heads, units: usize, n_tokens: usize, multiprocessors: u32) -> Result<usize> {
    let most = Launch::new(h, units, n_tokens, multiprocessors)?.workspace_bytes();
    (1..n_tokens).try_fold(most, |most, n| Ok(most.max(Launch::new(h, units, n, multiprocessors)?.workspace_bytes())))
}

/// Most dynamic shared memory of a block of any call.
pub fn most_shared_bytes(h: &Heads) -> Result<usize> {
    check(h)?;
    Ok(shared_bytes(h.d_k, h.d_v, columns(h, MAX_QUERIES.saturating_mul(h.group()))).max(shared_bytes(h.d_k, h.d_v, 8)))
}

/// How a step is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoreLaunch {
    /// Blocks: one for each KV head.
    pub blocks: u32,
    /// Dynamic shared memory of a block.
    pub shared_bytes: usize,
}

impl StoreLaunch {
    /// A step on a layer of these heads.
    pub fn new(h: &Heads) -> Result<Self> {
        check(h)?;
        if h.d_k.max(h.d_v) > STORE_MOST {
            let Heads { d_k, d_v, .. } = h;
            return Err(Error::Device(format!("heads of {d_k} and {d_v} elements; devices code rows of up to {STORE_MOST}")));
        }
        let blocks = u32::try_from(h.n_head_kv).map_err(|_| Error::Argument(format!("{} KV heads", h.n_head_kv)))?;
        Ok(StoreLaunch { blocks, shared_bytes: store_shared_bytes(h.d_k, h.d_v) })
    }
}

/// Dynamic shared memory of a block that stores: what `skv_store_shared` of `kernels/layer.h` says.
fn store_shared_bytes(d_k: usize, d_v: usize) -> usize {
    let (warps, d_16) = (STORE_THREADS / 32, d_k.max(d_v).next_multiple_of(16));
    let tables = 2 * 4 * 256 + 2 * 4 * 64 + KINDS * FORM_BYTES + 4 * d_16;
    let sums = 4 * 4 * TILE * warps + 4 * 4 * 2 * TILE + 4 * TILE + 4 * 4;
    let rows = 4 * TILE * (d_16 + 9);
    (tables + sums + rows).next_multiple_of(16)
}

fn check(h: &Heads) -> Result<()> {
    let whole = h.n_head > 0 && h.n_head_kv > 0 && h.n_head.is_multiple_of(h.n_head_kv);
    if !whole || [h.d_k, h.d_v].iter().any(|d| *d == 0 || *d > 2 * PAIRS) {
        return argument(format!("{} query heads of {} KV heads of {} and {} elements", h.n_head, h.n_head_kv, h.d_k, h.d_v));
    }
    Ok(())
}

/// Query columns of a block: 16 where there are more than 8, and where their queries and sums have room in the shared memory of every device.
fn columns(h: &Heads, queries: usize) -> usize {
    if queries > 8 && shared_bytes(h.d_k, h.d_v, 16) <= SHARED_EVERYWHERE {
        16
    } else {
        8
    }
}

/// As many splits as fill the device, where there are `wanted`.
fn splits(units: usize, wanted: usize) -> usize {
    wanted.clamp(1, (units / LEAST_UNITS).clamp(1, MOST_SPLITS))
}

/// Dynamic shared memory of a block of the attention kernel with so many columns: what `skv_attend_shared` of `kernels/layer.h` says.
fn shared_bytes(d_k: usize, d_v: usize, columns: usize) -> usize {
    const SHARED_BASIS: usize = 128;
    let (warps, d_16) = (THREADS / 32, d_k.next_multiple_of(16));
    let padded = d_16 + 8;
    let tables = 4 * 256 + 2 * 128 + KINDS * FORM_BYTES + 4 * columns * (6 + 3 * warps) + 4 * 4 * warps;
    let queries = 2 * columns * 2 * padded + 2 * columns * (d_16 + 72) + 4 * columns * (d_16 + 4);
    let probabilities = 4 * 2 * warps * columns * 36 + 4 * warps * 2 * columns;
    let sums = 2 * 4 * columns * (d_v + 4);
    let basis = if d_k <= SHARED_BASIS { 2 * d_16 * padded } else { 0 };
    (tables + queries + probabilities + sums + basis).next_multiple_of(16)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Multiprocessors of an H100, and of a small card.
    const LARGE: u32 = 132;
    const SMALL: u32 = 20;

    fn heads(n_head: usize, n_head_kv: usize, d: usize) -> Heads {
        Heads { n_head, n_head_kv, d_k: d, d_v: d }
    }

    /// Llama-3-8B, Qwen2.5-1.5B, SmolLM2-135M, Gemma-3's heads, and one with a KV head for each query head.
    fn models() -> [Heads; 5] {
        [heads(32, 8, 128), heads(12, 2, 128), heads(9, 3, 64), heads(8, 4, 256), heads(32, 32, 64)]
    }

    #[test]
    fn a_decoded_token_fills_the_device() {
        for h in models() {
            let l = Launch::new(&h, 2048, 1, LARGE).unwrap();
            assert_eq!((l.columns, l.grid[1], l.grid[2]), (8, 1, h.n_head_kv as u32), "{h:?}");
            let blocks: u32 = l.grid.iter().product();
            // 64 splits at most leave the device less than full where there are few KV heads.
            assert!(blocks <= 2 * LARGE && (blocks > LARGE || l.splits() == 64), "{h:?}: {l:?}");
            assert_eq!(l.combine_blocks as usize, h.n_head);
            assert_eq!(l.workspace_floats, h.n_head * l.splits() as usize * (2 + h.d_v));
        }
        assert_eq!(Launch::new(&heads(32, 8, 128), 2048, 1, LARGE).unwrap().grid, [33, 1, 8]);
        assert_eq!(Launch::new(&heads(12, 2, 128), 2048, 1, SMALL).unwrap().grid, [20, 1, 2]);
    }

    #[test]
    fn more_queries_take_the_wider_kernel_and_fewer_splits() {
        let h = heads(32, 8, 128);
        let grids = [1, 2, 3, 4, 8, 64].map(|n| Launch::new(&h, 2048, n, LARGE).unwrap()).map(|l| (l.columns, l.grid));
        assert_eq!(grids, [(8, [33, 1, 8]), (8, [33, 1, 8]), (16, [33, 1, 8]), (16, [33, 1, 8]), (16, [16, 2, 8]), (16, [2, 16, 8])]);
    }

    #[test]
    fn splits_are_worth_their_start() {
        let h = heads(9, 3, 64);
        for (units, want) in [(1, 1), (7, 1), (8, 2), (63, 15), (128, 32), (256, 64), (1 << 20, 64)] {
            assert_eq!(Launch::new(&h, units, 1, 1000).unwrap().splits(), want, "{units}");
        }
        // One multiprocessor has all of it in turn.
        assert_eq!(Launch::new(&h, 1 << 20, 64, 1).unwrap().grid, [1, 12, 3]);
        assert_eq!([(0, 0), (1, 0), (64, 5), (132, 126), (usize::MAX, usize::MAX)].map(|(e, t)| units(e, t)), [1, 2, 7, 130, usize::MAX]);
    }

    #[test]
    fn large_heads_stay_at_eight_columns() {
        let columns = [64, 128, 256, 512, 1024].map(|d| Launch::new(&heads(16, 1, d), 100, 64, LARGE).unwrap().columns);
        assert_eq!(columns, [16, 16, 16, 8, 8]);
        for h in models() {
            assert!(most_shared_bytes(&h).unwrap() <= SHARED_EVERYWHERE);
            for n in [1, 2, 7, 64] {
                assert!(Launch::new(&h, 100, n, LARGE).unwrap().shared_bytes <= most_shared_bytes(&h).unwrap());
            }
        }
    }

    #[test]
    fn a_workspace_serves_all_calls_of_fewer_tokens() {
        for h in models() {
            let all = workspace_bytes(&h, 2048, 64, LARGE).unwrap();
            let each: Vec<usize> = (1..=64).map(|n| Launch::new(&h, 2048, n, LARGE).unwrap().workspace_bytes()).collect();
            assert_eq!(Some(&all), each.iter().max());
        }
    }

    #[test]
    fn every_head_that_models_have_is_stored_on_every_device() {
        for h in models() {
            let l = StoreLaunch::new(&h).unwrap();
            assert!(l.blocks as usize == h.n_head_kv && l.shared_bytes <= SHARED_EVERYWHERE, "{h:?}: {l:?}");
        }
        assert!(
            StoreLaunch::new(&heads(8, 2, 512)).is_ok()
                && StoreLaunch::new(&heads(8, 2, 514)).is_err()
                && StoreLaunch::new(&heads(8, 3, 64)).is_err()
        );
    }

    #[test]
    fn absurd_shapes_are_refused() {
        let refused = |h: Heads, n_tokens, multiprocessors| Launch::new(&h, usize::MAX, n_tokens, multiprocessors).is_err();
        for (n_tokens, multiprocessors) in [(0, LARGE), (65, LARGE), (usize::MAX, LARGE), (1, 0)] {
            assert!(refused(heads(8, 2, 64), n_tokens, multiprocessors));
        }
        for h in [heads(8, 3, 64), heads(0, 1, 64), heads(8, 0, 64), heads(8, 2, 0), heads(8, 2, 1026), heads(8, 2, usize::MAX)] {
            assert!(refused(h, 1, LARGE) && most_shared_bytes(&h).is_err(), "{h:?}");
        }
        for h in [heads(usize::MAX, 1, 64), heads(usize::MAX, usize::MAX, 64), heads(1 << 17, 1 << 17, 64), heads(1 << 40, 1, 64)] {
            assert!(refused(h, 64, LARGE), "{h:?}");
        }
        // The largest layer that there can be is not.
        let most = Launch::new(&heads(4096, 4096, 1024), usize::MAX, 64, u32::MAX).unwrap();
        assert_eq!((most.grid, most.combine_blocks), ([64, 8, 4096], 64 * 4096));
        assert_eq!(most.workspace_floats, 64 * 4096 * 64 * 1026);
        assert_eq!(Launch::new(&heads(4096, 1, 64), 1, 64, 1).unwrap().grid, [1, 16384, 1]);
    }
}
