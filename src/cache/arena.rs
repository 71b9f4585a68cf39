//! Views of an arena: which bytes are what. The layout is described in [`crate::config`].
//!
//! An arena of zeros is valid and empty, so that a caller may allocate it as it likes. It holds no pointers; a copy of its
//! bytes is a copy of its contents. Must not know about threads: it hands out slices.

use crate::codec::{f16s, f16s_mut, TileMap};
use crate::config::{LayerGeometry, BANDS, HEAD_RECORD_BYTES};
use crate::error::{Error, Result};
use half::f16;
use std::ops::Range;

const MAGIC: u32 = 0x534b_5641;
const VERSION: u32 = 3;

/// Which bytes of an arena belong to one KV head.
#[derive(Debug, Clone)]
pub struct HeadRanges {
    /// Record and permanent exact rows.
    pub exact: Range<usize>,
    /// Before the fit: further exact rows and queries.
    pub raw: Range<usize>,
    /// After the fit: the bases of K and V.
    pub bases: Range<usize>,
    /// After the fit: tiles.
    pub tiles: Range<usize>,
}

fn word(bytes: &[u8], i: usize) -> u32 {
    u32::from_le_bytes(bytes[4 * i..4 * i + 4].try_into().expect("invariant: four bytes"))
}

/// Stamp the header of an arena that has bases.
pub fn write_header(arena: &mut [u8]) {
    arena[..4].copy_from_slice(&MAGIC.to_le_bytes());
    arena[4..8].copy_from_slice(&VERSION.to_le_bytes());
}

/// Byte ranges of every head. `fitted` says whether tiles exist; then the header and the widths are checked.
pub fn ranges(arena: &[u8], g: &LayerGeometry, band_tiles: &[usize; BANDS], fitted: bool) -> Result<Vec<HeadRanges>> {
    read_ranges(|r| &arena[r], arena.len(), g, band_tiles, fitted)
}

/// [`ranges`] of an arena of `len` bytes of which only the header and the widths of the bases may be looked at: other threads
/// may be writing rows. `read` borrows a range of it.
pub fn read_ranges<'a>(
    read: impl Fn(Range<usize>) -> &'a [u8],
    len: usize,
    g: &LayerGeometry,
    band_tiles: &[usize; BANDS],
    fitted: bool,
) -> Result<Vec<HeadRanges>> {
    if len < g.arena_bytes {
        return Err(Error::Buffer { need: g.arena_bytes, have: len });
    }
    let header = read(0..8);
    if fitted && (word(header, 0) != MAGIC || word(header, 1) != VERSION) {
        return Err(Error::Data("the arena has no bases, or is of another version".into()));
    }
    let body = g.body_offset();
    let mut tiles_at = body + g.n_head_kv * g.basis_bytes();
    let mut out = Vec::with_capacity(g.n_head_kv);
    for head in 0..g.n_head_kv {
        let mut r = HeadRanges {
            exact: g.exact_offset(head)..g.exact_offset(head + 1),
            raw: body + head * g.raw_head_bytes()..body + (head + 1) * g.raw_head_bytes(),
            bases: 0..0,
            tiles: 0..0,
        };
        if fitted {
            r.bases = body + head * g.basis_bytes()..body + (head + 1) * g.basis_bytes();
            let map = TileMap::of(*band_tiles, g, read(r.bases.clone()));
            if !map.is_possible(g) {
                return Err(Error::Data(format!("head {head} has more coefficients than elements")));
            }
            r.tiles = tiles_at..tiles_at + map.bytes();
            tiles_at = r.tiles.end;
        }
        out.push(r);
    }
    if fitted && tiles_at > g.arena_bytes {
        return Err(Error::Data("the tiles are longer than the arena".into()));
    }
    Ok(out)
}

/// Number of the last plan a head has carried out.
pub fn epoch(exact: &[u8]) -> i32 {
    word(exact, 0) as i32
}

/// Set [`epoch`].
pub fn set_epoch(exact: &mut [u8], epoch: i32) {
    exact[..4].copy_from_slice(&epoch.to_le_bytes());
}

/// Exact rows of one head: the permanent slots, then those that exist before the fit.
pub struct ExactRows<'a> {
    permanent: &'a [f16],
    raw: &'a [f16],
    row: usize,
    slots: usize,
}

impl<'a> ExactRows<'a> {
    /// `exact` and `raw` are a head's ranges; `raw` is empty after the fit.
    pub fn new(g: &LayerGeometry, slots: usize, exact: &'a [u8], raw: &'a [u8]) -> Result<Self> {
        Ok(ExactRows { permanent: f16s(&exact[HEAD_RECORD_BYTES..])?, raw: f16s(raw)?, row: g.head_elements(), slots })
    }
    /// Key and value of a slot, one after the other.
    pub fn row(&self, slot: usize) -> &'a [f16] {
        let (rows, i) = if slot < self.slots { (self.permanent, slot) } else { (self.raw, slot - self.slots) };
        &rows[i * self.row..(i + 1) * self.row]
    }
}

/// Mutable [`ExactRows::row`].
pub fn exact_row_mut<'a>(g: &LayerGeometry, slots: usize, exact: &'a mut [u8], raw: &'a mut [u8], slot: usize) -> Result<&'a mut [f16]> {
    let (bytes, i) = if slot < slots { (&mut exact[HEAD_RECORD_BYTES..], slot) } else { (raw, slot - slots) };
    f16s_mut(&mut bytes[i * g.row_bytes()..(i + 1) * g.row_bytes()])
}

/// The queries a head's group keeps for the fit: the tail of its raw range.
pub fn queries<'a>(g: &LayerGeometry, raw: &'a [u8]) -> Result<&'a [f16]> {
    f16s(&raw[raw.len() - g.query_bytes()..])
}

/// Mutable [`queries`].
pub fn queries_mut<'a>(g: &LayerGeometry, raw: &'a mut [u8]) -> Result<&'a mut [f16]> {
    let at = raw.len() - g.query_bytes();
    f16s_mut(&mut raw[at..])
}
