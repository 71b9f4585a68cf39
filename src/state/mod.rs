//! Saved state of some cells of one stream: their rows as they are stored, the bases they are coded in, and what the next fit
//! would look at. Little-endian; verified wholly (checksum, version, shape) before anything is changed.
//!
//! Read into an empty stream, a state continues as if it had never been saved (sums may run in another order), but that a fit which was being
//! prepared begins anew. Read beside other rows, codes are
//! copied bit for bit when the bases agree and re-coded in the stream's own bases when they do not.
//!
//! Layout: magic, version, shape hash, flags, counts; per cell its kind and its turn less its position; per layer its bases, exact rows, codes
//! (a byte per coefficient, before general compression by the caller if wanted); queries; CRC-32 of all that. Must not know C.

use crate::cache::arena::{self, ExactRows};
use crate::cache::{Cells, Layer, Location, Restore, Table};
use crate::codec::{self, Basis, TileMap};
use crate::config::{LayerGeometry, BANDS, TILE};
use crate::error::{argument, Error, Result};
use crate::rope::Turn;
use crate::simd;
use half::f16;

const MAGIC: u64 = u64::from_le_bytes(*b"SKVSTATE");
const VERSION: u32 = 3;
const EXACT: u8 = 1;
/// Plus the band.
const CODED: u8 = 2;

fn shape_hash(layers: &[&Layer]) -> u32 {
    let mut h = crc32fast::Hasher::new();
    for l in layers {
        let g = l.shape();
        for x in [g.n_head, g.n_head_kv, g.d_k, g.d_v] {
            h.update(&(x as u32).to_le_bytes());
        }
        h.update(&l.rope().to_bytes());
    }
    h.finalize()
}

/// Bytes of the state of `cells`, which ascend and hold rows.
pub fn write(table: &Table, layers: &[&Layer], arenas: &[&[u8]], cells: &[u32]) -> Result<Vec<u8>> {
    check_layers(table, layers, arenas.len())?;
    if cells.windows(2).any(|w| w[0] >= w[1]) {
        return argument("the cells to save do not ascend");
    }
    let fitted = table.is_fitted();
    let mut out = Vec::new();
    out.extend(MAGIC.to_le_bytes());
    for x in [VERSION, shape_hash(layers), u32::from(fitted), cells.len() as u32] {
        out.extend(x.to_le_bytes());
    }
    let mut located = Vec::with_capacity(cells.len());
    for cell in cells {
        let Some((at, turn)) = table.locate(*cell as usize) else {
            return argument(format!("cell {cell} holds no row"));
        };
        out.push(match at {
            Location::Slot(_) => EXACT,
            Location::Coded(tile, _) => CODED + table.geometry().band_of(tile) as u8,
        });
        out.extend(turn.to_le_bytes());
        located.push(at);
    }
    let with_queries = !fitted && table.geometry().keeps_queries();
    out.extend(u32::from(with_queries).to_le_bytes());
    for (l, a) in layers.iter().zip(arenas) {
        let g = l.shape();
        for r in arena::ranges(a, g, &table.geometry().band_tiles, fitted)? {
            let (exact, bases, tiles) = (&a[r.exact], &a[r.bases], &a[r.tiles]);
            out.extend(bases);
            let rows = ExactRows::new(g, table.geometry().exact, exact, if fitted { &[] } else { &a[r.raw.clone()] })?;
            for at in &located {
                match at {
                    Location::Slot(slot) => out.extend(rows.row(*slot).iter().flat_map(|x| x.to_le_bytes())),
                    Location::Coded(tile, row) => {
                        let map = TileMap::of(table.geometry().band_tiles, g, bases);
                        out.extend(codec::take_row(&map, tiles, tile * TILE + row));
                    }
                }
            }
            if with_queries {
                out.extend(arena::queries(g, &a[r.raw])?.iter().flat_map(|x| x.to_le_bytes()));
            }
        }
    }
    out.extend(table.queries_to_bytes());
    out.extend(crc32fast::hash(&out).to_le_bytes());
    Ok(out)
}

fn check_layers(table: &Table, layers: &[&Layer], arenas: usize) -> Result<()> {
    if layers.len() != table.geometry().layers.len() || arenas != layers.len() {
        return argument(format!("{} layers and {arenas} arenas; the table has {}", layers.len(), table.geometry().layers.len()));
    }
    match layers.iter().find(|l| l.geometry() != table.geometry()) {
        Some(_) => argument("a layer of another geometry"),
        None => Ok(()),
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let short = || Error::Data("the state is truncated".into());
        let (head, tail) = self.bytes.split_at_checked(n).ok_or_else(short)?;
        self.bytes = tail;
        Ok(head)
    }
    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.take(4)?.try_into().expect("invariant: four bytes")))
    }
}

/// What a state holds of one head of one layer, borrowed from its bytes.
struct SavedHead<'a> {
    bases: &'a [u8],
    rows: Vec<&'a [u8]>,
    queries: &'a [u8],
}

struct Saved<'a> {
    fitted: bool,
    /// Band of each coded row.
    coded: Vec<Option<usize>>,
    bases: Vec<i32>,
    layers: Vec<Vec<SavedHead<'a>>>,
    queries: &'a [u8],
}

fn parse<'a>(table: &Table, layers: &[&Layer], n: usize, bytes: &'a [u8]) -> Result<Saved<'a>> {
    let bad = |m: &str| Err(Error::Data(format!("state: {m}")));
    let mut r = Reader { bytes };
    if r.take(8)? != MAGIC.to_le_bytes() {
        return bad("not a saved spectral-kv state");
    }
    let version = r.u32()?;
    if version != VERSION {
        return bad(&format!("version {version}, this library reads {VERSION}"));
    }
    let body = bytes.len().saturating_sub(4).max(12);
    if bytes.len() < 16 || crc32fast::hash(&bytes[..body]).to_le_bytes() != bytes[body..] {
        return bad("the checksum is wrong: truncated or corrupted");
    }
    r.bytes = &bytes[12..body];
    if r.u32()? != shape_hash(layers) {
        return bad("saved from a model of other shapes or rope settings");
    }
    let fitted = r.u32()? != 0;
    if r.u32()? as usize != n {
        return bad("another number of cells");
    }
    if fitted && table.geometry().tiles == 0 {
        return bad("coded rows cannot go into a cache whose window covers its context");
    }
    let (mut coded, mut bases) = (Vec::with_capacity(n), Vec::with_capacity(n));
    for _ in 0..n {
        coded.push(match r.take(1)?[0] {
            EXACT => None,
            kind if (CODED..CODED + BANDS as u8).contains(&kind) => Some(usize::from(kind - CODED)),
            _ => return bad("a row of an unknown kind"),
        });
        bases.push(r.u32()? as i32);
    }
    if !fitted && coded.iter().any(Option::is_some) {
        return bad("coded rows without bases");
    }
    let mut heads = Vec::with_capacity(layers.len());
    let with_queries = r.u32()? != 0;
    for l in layers {
        let g = l.shape();
        let mut layer = Vec::with_capacity(g.n_head_kv);
        for _ in 0..g.n_head_kv {
            let bases = r.take(if fitted { g.basis_bytes() } else { 0 })?;
            let map = fitted.then(|| TileMap::of(table.geometry().band_tiles, g, bases));
            if map.as_ref().is_some_and(|m| !m.is_possible(g)) {
                return bad("more coefficients than elements");
            }
            let bytes_of = |band: &Option<usize>| match (band, &map) {
                (Some(band), Some(map)) => map.taken_bytes(*band),
                _ => g.row_bytes(),
            };
            let rows = coded.iter().map(|c| r.take(bytes_of(c))).collect::<Result<_>>()?;
            layer.push(SavedHead { bases, rows, queries: r.take(if with_queries { g.query_bytes() } else { 0 })? });
        }
        heads.push(layer);
    }
    Ok(Saved { fitted, coded, bases, layers: heads, queries: r.bytes })
}

/// Read a state into `cells`, given in the order they were written; rows they held are dropped. `all` describes every
/// cell of the stream. On error these cells hold no rows and no other row has changed.
pub fn read(table: &mut Table, layers: &[&Layer], arenas: &mut [&mut [u8]], all: Cells, cells: &[u32], bytes: &[u8]) -> Result<()> {
    check_layers(table, layers, arenas.len())?;
    let saved = parse(table, layers, cells.len(), bytes)?;
    for (l, a) in layers.iter().zip(arenas.iter()) {
        if a.len() < l.shape().arena_bytes {
            return Err(Error::Buffer { need: l.shape().arena_bytes, have: a.len() });
        }
    }
    if saved.queries.len() != table.queries_to_bytes().len() {
        return Err(Error::Data("state: the list of queries has another length".into()));
    }
    let place = table.plan_restore(all, cells, &saved.coded, &saved.bases, saved.fitted)?;
    // Codes in bases that take more room than this cache's tiles have cannot be adopted as they are.
    if place.adopt {
        for (l, heads) in layers.iter().zip(&saved.layers) {
            let g = l.shape();
            let tiles: usize = heads.iter().map(|h| TileMap::of(table.geometry().band_tiles, g, h.bases).bytes()).sum();
            if tiles + g.n_head_kv * g.basis_bytes() > g.body_bytes {
                return Err(Error::Data("state: saved at a higher code rate than this cache has".into()));
            }
        }
    }
    for ((l, arena), heads) in layers.iter().zip(arenas.iter_mut()).zip(&saved.layers) {
        restore_layer(l, arena, table, &saved, heads, &place)?;
    }
    table.commit_restore(&place, cells);
    if place.was_empty && !place.fitted {
        // A sequence may come back under another number.
        let first = cells.first().map(|c| all.seq[*c as usize]);
        let one = first.filter(|s| cells.iter().all(|c| all.seq[*c as usize] == *s));
        table.queries_from_bytes(saved.queries, one)?;
    }
    Ok(())
}

fn restore_layer(l: &Layer, arena: &mut [u8], table: &Table, saved: &Saved, heads: &[SavedHead], place: &Restore) -> Result<()> {
    l.mark_used();
    let (g, slots, band_tiles) = (l.shape(), table.geometry().exact, table.geometry().band_tiles);
    let was_fitted = place.fitted && !place.adopt;
    let before = arena::ranges(arena, g, &band_tiles, was_fitted)?;
    if place.adopt {
        let waiting = arena.to_vec();
        for (head, (saved, r)) in heads.iter().zip(&before).enumerate() {
            let at = g.body_offset() + head * g.basis_bytes();
            arena[at..at + g.basis_bytes()].copy_from_slice(saved.bases);
            let rows = ExactRows::new(g, slots, &waiting[r.exact.clone()], &waiting[r.raw.clone()])?;
            for (from, to) in &place.relocations {
                arena::exact_row_mut(g, slots, &mut arena[r.exact.clone()], &mut [], *to as usize)?.copy_from_slice(rows.row(*from as usize));
            }
        }
        arena::write_header(arena);
    }
    let now = arena::ranges(arena, g, &band_tiles, place.fitted)?;
    let kernels = simd::kernels();
    let (mut turn, mut row, mut work) = (Turn::default(), vec![0.0f32; g.head_elements()], Vec::new());
    for (head, r) in heads.iter().zip(now) {
        let mut own = (Basis::default(), Basis::default());
        let mut theirs = (Basis::default(), Basis::default());
        let own_bytes = arena[r.bases.clone()].to_vec();
        let split = LayerGeometry::basis_bytes_of(g.d_k);
        let same = own_bytes == head.bases;
        for (basis, bytes, needed) in [(&mut own, &own_bytes[..], place.fitted), (&mut theirs, head.bases, saved.fitted && !same)] {
            if needed {
                basis.0.load(&bytes[..split], g.d_k, true)?;
                basis.1.load(&bytes[split..], g.d_v, true)?;
            }
        }
        let map = place.fitted.then(|| TileMap::of(band_tiles, g, &own_bytes));
        for (i, bytes) in head.rows.iter().enumerate() {
            if let Some(slot) = place.slots[i] {
                let (exact, rest) = arena.split_at_mut(r.exact.end);
                let raw = if place.fitted { &mut [][..] } else { &mut rest[r.raw.start - r.exact.end..r.raw.end - r.exact.end] };
                let out = arena::exact_row_mut(g, slots, &mut exact[r.exact.clone()], raw, slot as usize)?;
                for (out, x) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *out = f16::from_le_bytes([x[0], x[1]]);
                }
                continue;
            }
            let (target, map) = (place.rows[i] as usize, map.as_ref().expect("invariant: coded rows need bases"));
            let tiles = &mut arena[r.tiles.clone()];
            let to = map.place(target / TILE);
            if same && saved.coded[i] == Some(to.band) {
                codec::put_row(map, tiles, target, bytes);
                continue;
            }
            if let Some(band) = saved.coded[i] {
                let (k, v) = if same { (&own.0, &own.1) } else { (&theirs.0, &theirs.1) };
                codec::decode_taken(kernels, k, v, band, bytes, &mut row);
            } else {
                for (out, x) in row.iter_mut().zip(bytes.chunks_exact(2)) {
                    *out = f16::from_le_bytes([x[0], x[1]]).to_f32();
                }
                l.rope().turn(i64::from(place.turns[i]), &mut turn);
                l.rope().rotate(&turn, &mut row[..g.d_k]);
            }
            let [(gk, ck), (gv, cv)] = codec::split_tile_mut(&mut tiles[to.bytes], to.k);
            codec::encode_row(kernels, &own.0, to.band, &row[..g.d_k], target % TILE, gk, ck, &mut work);
            codec::encode_row(kernels, &own.1, to.band, &row[g.d_k..], target % TILE, gv, cv, &mut work);
        }
        if place.was_empty && !place.fitted && table.geometry().keeps_queries() && !head.queries.is_empty() {
            for (out, x) in arena::queries_mut(g, &mut arena[r.raw])?.iter_mut().zip(head.queries.chunks_exact(2)) {
                *out = f16::from_le_bytes([x[0], x[1]]);
            }
        }
    }
    Ok(())
}
