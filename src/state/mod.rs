//! Saved state of some cells of one stream: their rows as they are stored, the bases they are coded in, and what the next fit
//! would look at. Little-endian; verified wholly (checksum, version, shape) before anything is changed.
//!
//! Read into an empty stream, a state continues as if it had never been saved (sums may run in another order), but that a fit which was being
//! prepared begins anew. Read beside other rows, codes are
//! copied bit for bit when the bases agree and re-coded in the stream's own bases when they do not.
//!
//! Layout: magic, version, shape hash, flags, counts; per cell its kind and its turn less its position; per KV head its bases, what its waiting
//! rows are coded relative to, and its rows: exact ones in f16, packed codes of others; queries; CRC-32 of all that. Must not know C.

use crate::cache::arena::{self, AllBases, ExactRows, Pieces};
use crate::cache::{Cells, Geometry, Layer, Location, Restore, Table};
use crate::codec;
use crate::error::{argument, Error, Result};
use crate::layout::geometry::{waiting_form, HeadRanges, Kind, FORMER, KINDS, WAITING, WAITING_BITS};
use crate::layout::{basis, Fine, Heads, TileForm, BANDS, TILE};
use crate::rope::Turn;
use crate::simd;
use half::f16;
use std::ops::Range;

const MAGIC: u64 = u64::from_le_bytes(*b"SKVSTATE");
const VERSION: u32 = 6;
const EXACT: u8 = 1;
/// Plus the [`crate::layout::geometry::Kind`].
const CODED: u8 = 2;
/// Magic, version, shape hash, whether there are bases, number of cells.
const HEADER_BYTES: usize = 24;
/// Kind of a cell's row, turn less position.
const CELL_BYTES: usize = 5;
/// Whether there are queries and former bases, and in how many bits rows wait.
const FLAGS_BYTES: usize = 12;
const CRC_BYTES: usize = 4;

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

/// A state that is about to be written: where its rows are, and how many bytes they take.
pub struct Saving<'a> {
    table: &'a Table,
    arena: &'a [u8],
    located: Vec<(Location, i32)>,
    /// Fitted and former bases are among what is saved.
    there: (bool, bool),
    with_queries: bool,
    shape_hash: u32,
    heads: Vec<Head<'a>>,
    size: usize,
}

/// A head of some layer, and where what it holds is.
struct Head<'a> {
    layer: &'a Layer,
    ranges: HeadRanges,
    pieces: Pieces,
}

impl<'a> Saving<'a> {
    /// The state of `cells`, which ascend and hold rows.
    pub fn new(table: &'a Table, layers: &[&'a Layer], arena: &'a [u8], cells: &[u32]) -> Result<Self> {
        check_layers(table, layers, arena)?;
        if cells.windows(2).any(|w| w[0] >= w[1]) {
            return argument("the cells to save do not ascend");
        }
        let g = table.geometry();
        let locate = |cell: &u32| table.locate(*cell as usize).ok_or_else(|| Error::Argument(format!("cell {cell} holds no row")));
        let located = cells.iter().map(locate).collect::<Result<Vec<_>>>()?;
        let is_former = |(at, _): &(Location, i32)| matches!(at, Location::Coded(tile, _) if table.number(*tile) != *tile);
        let there = (table.is_fitted(), located.iter().any(is_former));
        let mut heads = Vec::with_capacity(g.n_heads());
        for l in layers {
            for (head, ranges) in arena::heads(g, l.index()).into_iter().enumerate() {
                let pieces = Pieces::new(g, l.index(), head, &arena, &ranges, there)?;
                heads.push(Head { layer: l, ranges, pieces });
            }
        }
        let with_queries = !table.is_fitted() && g.keeps_queries();
        let mut state = Saving { table, arena, located, there, with_queries, shape_hash: shape_hash(layers), heads, size: 0 };
        let heads: usize = state.heads.iter().map(|head| state.head_bytes(head)).sum();
        state.size = HEADER_BYTES + state.located.len() * CELL_BYTES + FLAGS_BYTES + heads + table.queries_to_bytes().len() + CRC_BYTES;
        Ok(state)
    }

    /// Bytes that [`Saving::write`] writes.
    pub fn size(&self) -> usize {
        self.size
    }

    /// What a head has for all of its rows, as ranges of the arena.
    fn common(&self, r: &HeadRanges) -> impl Iterator<Item = Range<usize>> {
        let bases = [(self.there.0, r.bases.clone()), (self.there.1, r.former_bases()), (true, r.plain.clone()), (true, r.recent.clone())];
        bases.into_iter().filter(|(is_there, _)| *is_there).map(|(_, range)| range)
    }

    /// Kind and bytes of the piece of a tile.
    fn piece(&self, head: &Head, tile: usize) -> (&'a [u8], Kind) {
        let (kind, place) = head.pieces.place(self.table.number(tile));
        (&self.arena[place], kind)
    }

    fn head_bytes(&self, head: &Head) -> usize {
        let queries = if self.with_queries { head.ranges.queries.len() } else { 0 };
        let row = |(at, _): &(Location, i32)| match *at {
            Location::Slot(_) => head.layer.shape().row_bytes(),
            Location::Coded(tile, row) => {
                let (piece, kind) = self.piece(head, tile);
                let form = head.pieces.form(kind);
                let is_fine = form.fine_rows(piece).contains(&(row as u8));
                form.taken_bytes(u8::from(is_fine)).expect("invariant: a row is fine or not")
            }
        };
        self.common(&head.ranges).map(|r| r.len()).sum::<usize>() + self.located.iter().map(row).sum::<usize>() + queries
    }

    /// Write all of it to the beginning of `out`.
    pub fn write(&self, out: &mut [u8]) -> Result<()> {
        let Some(out) = out.get_mut(..self.size) else {
            return Err(Error::Buffer { need: self.size, have: out.len() });
        };
        let (body, crc) = out.split_at_mut(self.size - CRC_BYTES);
        let (mut w, g) = (Writer(body), self.table.geometry());
        w.put(&MAGIC.to_le_bytes());
        w.words([VERSION, self.shape_hash, u32::from(self.there.0), self.located.len() as u32]);
        for (at, turn) in &self.located {
            w.put(&[match at {
                Location::Slot(_) => EXACT,
                Location::Coded(tile, _) => CODED + g.kind_of(self.table.number(*tile)) as u8,
            }]);
            w.put(&turn.to_le_bytes());
        }
        w.words([u32::from(self.with_queries), u32::from(self.there.1), g.waiting_bits]);
        for head in &self.heads {
            self.write_head(head, &mut w)?;
        }
        w.put(&self.table.queries_to_bytes());
        assert!(w.0.is_empty(), "invariant: as many bytes as were computed");
        crc.copy_from_slice(&crc32fast::hash(body).to_le_bytes());
        Ok(())
    }

    fn write_head(&self, head: &Head, w: &mut Writer) -> Result<()> {
        self.common(&head.ranges).for_each(|range| w.put(&self.arena[range]));
        let rows = ExactRows::new(head.layer.shape(), &self.arena[head.ranges.exact.clone()])?;
        for (at, _) in &self.located {
            match *at {
                Location::Slot(slot) => rows.row(slot).iter().for_each(|x| w.put(&x.to_le_bytes())),
                Location::Coded(tile, row) => {
                    let (piece, kind) = self.piece(head, tile);
                    w.put(&head.pieces.form(kind).take_row(piece, row));
                }
            }
        }
        if self.with_queries {
            let (queries, norms) = arena::queries(&self.arena[head.ranges.queries.clone()])?;
            w.put(queries);
            norms.iter().for_each(|x| w.put(&x.to_le_bytes()));
        }
        Ok(())
    }
}

/// Fills a buffer of the right size from its beginning.
struct Writer<'a>(&'a mut [u8]);

impl Writer<'_> {
    fn put(&mut self, bytes: &[u8]) {
        let (here, rest) = std::mem::take(&mut self.0).split_at_mut(bytes.len());
        here.copy_from_slice(bytes);
        self.0 = rest;
    }
    fn words<const N: usize>(&mut self, words: [u32; N]) {
        words.iter().for_each(|x| self.put(&x.to_le_bytes()));
    }
}

fn check_layers(table: &Table, layers: &[&Layer], arena: &[u8]) -> Result<()> {
    let g = table.geometry();
    if layers.len() != g.layers.len() || layers.iter().enumerate().any(|(i, l)| l.index() != i) {
        return argument(format!("{} layers, or not in their order; the table has {}", layers.len(), g.layers.len()));
    }
    if arena.len() < g.arena_bytes {
        return Err(Error::Buffer { need: g.arena_bytes, have: arena.len() });
    }
    match layers.iter().find(|l| l.geometry() != g) {
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

/// What a state that is read holds of one head of one layer, borrowed from its bytes.
struct SavedHead<'a> {
    bases: &'a [u8],
    former: &'a [u8],
    plain: &'a [u8],
    recent: &'a [u8],
    waiting_bits: u32,
    /// How rows of each kind are coded.
    forms: [TileForm; KINDS],
    rows: Vec<&'a [u8]>,
    queries: &'a [u8],
}

impl SavedHead<'_> {
    fn load(&self, h: &Heads) -> Result<AllBases> {
        // In a state nothing is aligned.
        let ([fitted, former], mut all) = ([self.bases, self.former].map(<[u8]>::to_vec), AllBases::default());
        all.read(h, [&fitted, &former], (self.plain, self.waiting_bits), false)?;
        Ok(all)
    }
}

struct Saved<'a> {
    fitted: bool,
    /// Kind of each coded row.
    coded: Vec<Option<Kind>>,
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
            kind if (CODED..CODED + KINDS as u8).contains(&kind) => Some(usize::from(kind - CODED)),
            _ => return bad("a row of an unknown kind"),
        });
        bases.push(r.u32()? as i32);
    }
    if !fitted && coded.iter().flatten().any(|kind| *kind != WAITING) {
        return bad("coded rows without bases");
    }
    let mut heads = Vec::with_capacity(layers.len());
    let with_queries = r.u32()? != 0;
    let former = r.u32()? != 0;
    if !former && coded.iter().flatten().any(|kind| *kind >= FORMER) {
        return bad("coded rows without bases");
    }
    let waiting_bits = r.u32()?;
    if !WAITING_BITS.contains(&waiting_bits) {
        return bad("waiting rows of an unknown kind");
    }
    for l in layers {
        let ranges = arena::heads(table.geometry(), l.index());
        let head = |ranges: &HeadRanges| parse_head(&mut r, (l, waiting_bits), ranges, (fitted, former), &coded, with_queries);
        heads.push(ranges.iter().map(head).collect::<Result<Vec<_>>>()?);
    }
    Ok(Saved { fitted, coded, bases, layers: heads, queries: r.bytes })
}

fn parse_head<'a>(
    r: &mut Reader<'a>,
    (l, waiting_bits): (&Layer, u32),
    ranges: &HeadRanges,
    (fitted, former): (bool, bool),
    coded: &[Option<Kind>],
    with_queries: bool,
) -> Result<SavedHead<'a>> {
    let h = l.shape();
    let bases = r.take(if fitted { ranges.bases.len() } else { 0 })?;
    let former = r.take(if former { ranges.former_bases().len() } else { 0 })?;
    let (plain, recent) = (r.take(ranges.plain.len())?, r.take(ranges.recent.len())?);
    let waiting = waiting_form(h, waiting_bits);
    let mut forms = [waiting; KINDS];
    let k_bytes = [basis::bytes_of(h.d_k), basis::decoder_bytes_of(h.d_k)];
    for ((first, bases), k_bytes) in [(0, bases), (FORMER, former)].into_iter().zip(k_bytes).filter(|((_, bases), _)| !bases.is_empty()) {
        forms[first..first + BANDS].copy_from_slice(&saved_forms(h, bases.split_at(k_bytes))?);
    }
    let mut row = |c: &Option<usize>| match c {
        Some(kind) => {
            let n = r.bytes.first().and_then(|flag| forms[*kind].taken_bytes(*flag));
            r.take(n.ok_or_else(|| Error::Data("state: a row that is no row".into()))?)
        }
        None => r.take(h.row_bytes()),
    };
    let rows = coded.iter().map(&mut row).collect::<Result<_>>()?;
    let queries = r.take(if with_queries { ranges.queries.len() } else { 0 })?;
    Ok(SavedHead { bases, former, plain, recent, waiting_bits, forms, rows, queries })
}

/// How rows of a state are coded in these bases, by band.
fn saved_forms(h: &Heads, (k, v): (&[u8], &[u8])) -> Result<[TileForm; BANDS]> {
    let (k, v) = (basis::widths_of(k), basis::widths_of(v));
    if k.iter().any(|w| w.rank() > h.d_k) || v.iter().any(|w| w.rank() > h.d_v) {
        return Err(Error::Data("state: more coefficients than elements".into()));
    }
    Ok(std::array::from_fn(|band| TileForm::new(k[band], v[band], h.d_k, h.d_v, Fine::Residuals)))
}

/// Read a state into `cells`, given in the order they were written; rows they held are dropped. `all` describes every
/// cell of the stream. On error these cells hold no rows and no other row has changed.
pub fn read(table: &mut Table, layers: &[&Layer], arena: &mut [u8], all: Cells, cells: &[u32], bytes: &[u8]) -> Result<()> {
    check_layers(table, layers, arena)?;
    let saved = parse(table, layers, cells.len(), bytes)?;
    if saved.queries.len() != table.queries_to_bytes().len() {
        return Err(Error::Data("state: the list of queries has another length".into()));
    }
    let place = table.plan_restore(all, cells, &saved.coded, &saved.bases, saved.fitted)?;
    let offsets = if place.adopt { adopted_offsets(table.geometry(), &saved)? } else { Vec::new() };
    let mut first_head = 0;
    for (l, heads) in layers.iter().zip(&saved.layers) {
        l.mark_used();
        for (head, own) in heads.iter().enumerate() {
            let r = table.geometry().head(l.index(), head);
            adopt_head(arena, &r, own, &place, offsets.get(first_head + head))?;
            restore_head(l, head, &r, arena, table, &saved, own, &place)?;
        }
        first_head += heads.len();
    }
    table.commit_restore(&place, cells);
    if place.was_empty {
        // A sequence may come back under another number.
        let first = cells.first().map(|c| all.seq[*c as usize]);
        let one = first.filter(|s| cells.iter().all(|c| all.seq[*c as usize] == *s));
        table.queries_from_bytes(saved.queries, one)?;
    }
    Ok(())
}

/// Where the pieces of each head begin when the stream takes over the state's bases. Codes in bases that take more room than this cache's tiles
/// have cannot be adopted as they are.
fn adopted_offsets(g: &Geometry, saved: &Saved) -> Result<Vec<[usize; BANDS]>> {
    let (mut at, mut out) = ([0; BANDS], Vec::new());
    for head in saved.layers.iter().flatten() {
        out.push(at);
        at.iter_mut().zip(&head.forms).for_each(|(at, form)| *at += form.bytes());
    }
    if at.iter().zip(g.block_bytes).any(|(at, block)| *at > block) {
        return Err(Error::Data("state: saved at a higher code rate than this cache has".into()));
    }
    Ok(out)
}

/// Take over what a head's rows are coded with, as far as the stream has nothing of its own.
fn adopt_head(arena: &mut [u8], r: &HeadRanges, saved: &SavedHead, place: &Restore, offsets: Option<&[usize; BANDS]>) -> Result<()> {
    if let Some(offsets) = offsets {
        arena[r.bases.clone()].copy_from_slice(saved.bases);
        arena::set_pieces(&mut arena[r.record.clone()], *offsets);
    }
    if place.adopt_plain {
        arena[r.plain.clone()].copy_from_slice(saved.plain);
    }
    if place.was_empty {
        arena[r.recent.clone()].copy_from_slice(saved.recent);
    }
    if place.was_empty && !place.fitted && !saved.queries.is_empty() {
        let (queries, norms) = arena::queries_mut(&mut arena[r.queries.clone()])?;
        let (saved_queries, saved_norms) = saved.queries.split_at(queries.len());
        queries.copy_from_slice(saved_queries);
        let float = |b: &[u8]| f32::from_le_bytes(b.try_into().expect("invariant: four bytes"));
        norms.iter_mut().zip(saved_norms.chunks_exact(4)).for_each(|(norm, b)| *norm = float(b));
    }
    Ok(())
}

#[expect(clippy::too_many_arguments, reason = "a head, what is saved of it and where it goes")]
fn restore_head(
    l: &Layer,
    head: usize,
    r: &HeadRanges,
    arena: &mut [u8],
    table: &Table,
    saved: &Saved,
    own: &SavedHead,
    place: &Restore,
) -> Result<()> {
    let (h, kernels) = (l.shape(), simd::kernels());
    let (g, mut here) = (table.geometry(), AllBases::default());
    // Nothing is put into tiles in the former bases.
    let pieces = Pieces::new(g, l.index(), head, &arena, r, (place.fitted, false))?;
    here.load(g, h, &arena, r, (place.fitted, false), true)?;
    let there = own.load(h)?;
    let same_plain = arena[r.plain.clone()] == *own.plain && g.waiting_bits == own.waiting_bits;
    let same_bases = place.fitted && arena[r.bases.clone()] == *own.bases;
    let same = |kind: Kind| if kind == WAITING { same_plain } else { same_bases };
    let (mut turn, mut row, mut work) = (Turn::default(), vec![0.0f32; h.elements()], codec::TileWork::default());
    for (i, bytes) in own.rows.iter().enumerate() {
        if let Some(slot) = place.slots[i] {
            let out = arena::exact_row_mut(h, &mut arena[r.exact.clone()], slot as usize)?;
            out.iter_mut().zip(bytes.chunks_exact(2)).for_each(|(out, x)| *out = f16::from_le_bytes([x[0], x[1]]));
            continue;
        }
        let target = place.rows[i] as usize;
        let (to, at) = pieces.place(target / TILE);
        if saved.coded[i] == Some(to) && same(to) {
            pieces.form(to).put_row(&mut arena[at], target % TILE, bytes);
            continue;
        }
        if let Some(kind) = saved.coded[i] {
            codec::decode_row(kernels, there.of(kind), &own.forms[kind], bytes, &mut row);
        } else {
            row.iter_mut().zip(bytes.chunks_exact(2)).for_each(|(out, x)| *out = f16::from_le_bytes([x[0], x[1]]).to_f32());
            l.rope().turn(i64::from(place.turns[i]), &mut turn);
            l.rope().rotate(&turn, &mut row[..h.d_k]);
        }
        let (k, v) = row.split_at(h.d_k);
        codec::encode_row(kernels, here.of(to), pieces.form(to), k, v, target % TILE, &mut arena[at], &mut work);
    }
    Ok(())
}
