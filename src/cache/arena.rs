//! Views of an arena: which bytes are what. The layout is described in [`crate::layout::geometry`].
//!
//! An arena of zeros is valid and empty, so that a caller may allocate it as it likes. It holds no pointers; a copy of its
//! bytes is a copy of its contents. Must not know about threads: it hands out slices.

use crate::attention::HeadBases;
use crate::codec::Basis;
use crate::error::{Error, Result};
use crate::layout::geometry::{waiting_form, Geometry, HeadRanges, Kind, FORMER, WAITING};
use crate::layout::{basis, f16s, f16s_mut, Fine, Heads, TileForm, BANDS, QUERY_SLOTS};
use crate::simd;
use half::f16;
use std::ops::Range;

/// Stands in a head's record when it has bases: of this layout, and no other.
const MAGIC: u32 = 0x534b_5604;
/// Words of a record: number of the last plan, the magic number, where the head's pieces of tiles begin in each band's blocks, [`promise`].
const OFFSETS: usize = 2;
const PROMISE: usize = OFFSETS + BANDS;

/// The bytes of an arena that one head may look at: its own ranges and its own pieces of tiles.
pub trait Bytes {
    /// Some of them.
    fn get(&self, range: Range<usize>) -> &[u8];
}

/// The same, to change.
pub trait BytesMut: Bytes {
    /// Some of them.
    fn get_mut(&mut self, range: Range<usize>) -> &mut [u8];
}

impl Bytes for &[u8] {
    fn get(&self, range: Range<usize>) -> &[u8] {
        &self[range]
    }
}

impl Bytes for &mut [u8] {
    fn get(&self, range: Range<usize>) -> &[u8] {
        &self[range]
    }
}

impl BytesMut for &mut [u8] {
    fn get_mut(&mut self, range: Range<usize>) -> &mut [u8] {
        &mut self[range]
    }
}

fn word(bytes: &[u8], i: usize) -> u32 {
    u32::from_le_bytes(bytes[4 * i..4 * i + 4].try_into().expect("invariant: four bytes"))
}

fn put_word(bytes: &mut [u8], i: usize, x: u32) {
    bytes[4 * i..4 * i + 4].copy_from_slice(&x.to_le_bytes());
}

/// Number of the last plan a head has carried out.
pub fn epoch(record: &[u8]) -> i32 {
    word(record, 0) as i32
}

/// Set [`epoch`].
pub fn set_epoch(record: &mut [u8], epoch: i32) {
    put_word(record, 0, epoch as u32);
}

/// Keep a head's record and what its bases need to decode as the former ones, before others take their place.
pub fn keep_former(h: &Heads, bytes: &mut impl BytesMut, r: &HeadRanges) {
    let (k, v) = bytes.get(r.bases.clone()).split_at(basis::bytes_of(h.d_k));
    let kept = [bytes.get(r.record.clone()), &k[..basis::decoder_bytes_of(h.d_k)], &v[..basis::decoder_bytes_of(h.d_v)]].concat();
    bytes.get_mut(r.former.clone()).copy_from_slice(&kept);
}

/// Note in a record that there are bases, and where the head's pieces begin in blocks.
pub fn set_pieces(record: &mut [u8], offsets: [usize; BANDS]) {
    put_word(record, 1, MAGIC);
    offsets.iter().enumerate().for_each(|(band, at)| put_word(record, OFFSETS + band, *at as u32));
}

/// The relative error with which the newest values would have been coded when the bases were fitted; 0 when there were none.
pub fn promise(record: &[u8]) -> f32 {
    f32::from_bits(word(record, PROMISE))
}

/// Set [`promise`].
pub fn set_promise(record: &mut [u8], error: f32) {
    put_word(record, PROMISE, error.to_bits());
}

/// What a head's tiles are coded in.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Bases {
    /// Those that were fitted last.
    Fitted,
    /// Those of rows that wait.
    Plain,
    /// Those that were fitted before.
    Former,
}

/// What tiles of a kind are coded in.
pub fn bases_of(kind: Kind) -> Bases {
    match kind {
        WAITING => Bases::Plain,
        FORMER.. => Bases::Former,
        _ => Bases::Fitted,
    }
}

/// First byte of the first piece, bytes to the next, and form; by band.
type Bands = [(usize, usize, TileForm); BANDS];

/// Where a head's pieces of the tiles lie, and how those of each kind are coded.
#[derive(Debug, Clone)]
pub struct Pieces {
    fitted: Option<Bands>,
    former: Option<Bands>,
    /// The same of waiting rows, whose pieces lie the other way round.
    waiting: (usize, usize, TileForm),
    /// Tiles of the bands end here, numbered.
    ends: [usize; BANDS],
    /// Tiles in the former bases are numbered from here on.
    first_former: usize,
}

impl Pieces {
    /// Those of a head. `fitted` and `former` say whether there are bases, and others before them; without any only rows that wait are coded.
    pub fn new(g: &Geometry, layer: usize, head: usize, bytes: &impl Bytes, r: &HeadRanges, (fitted, former): (bool, bool)) -> Result<Self> {
        let (at, form) = g.waiting_piece(layer, head);
        let waiting = (if g.waiting > 0 { g.waiting_offset(0) + at } else { 0 }, g.waiting_block(), form);
        let d = g.layers[layer].d_k;
        let bands = |record: &[u8], bases: &[u8], k_bytes: usize| bands(g, layer, head, record, bases.split_at(k_bytes));
        Ok(Pieces {
            fitted: fitted.then(|| bands(bytes.get(r.record.clone()), bytes.get(r.bases.clone()), basis::bytes_of(d))).transpose()?,
            former: former.then(|| bands(bytes.get(r.former_record()), bytes.get(r.former_bases()), basis::decoder_bytes_of(d))).transpose()?,
            waiting,
            ends: std::array::from_fn(|band| g.band(band).end),
            first_former: g.former(0),
        })
    }

    fn bands(&self, kind: Kind) -> &Bands {
        let bands = if kind < WAITING { &self.fitted } else { &self.former };
        bands.as_ref().expect("invariant: a plan was checked for tiles without bases")
    }

    /// Kind of a tile, and the bytes of its piece. The tile is numbered as in a plan.
    pub fn place(&self, number: usize) -> (Kind, Range<usize>) {
        let (tile, first_kind) = number.checked_sub(self.first_former).map_or((number, 0), |tile| (tile, FORMER));
        let Some(band) = self.ends.iter().position(|end| tile < *end) else {
            let (first, stride, form) = &self.waiting;
            let at = first - (tile - self.ends[BANDS - 1]) * stride;
            return (WAITING, at..at + form.bytes());
        };
        let first = if band == 0 { 0 } else { self.ends[band - 1] };
        let (at, stride, form) = &self.bands(first_kind)[band];
        let at = at + (tile - first) * stride;
        (first_kind + band, at..at + form.bytes())
    }

    /// How the tiles of a kind are coded.
    pub fn form(&self, kind: Kind) -> &TileForm {
        if kind == WAITING {
            return &self.waiting.2;
        }
        &self.bands(kind)[kind % FORMER].2
    }
}

/// The pieces of a head with these bases.
fn bands(g: &Geometry, layer: usize, head: usize, record: &[u8], (k, v): (&[u8], &[u8])) -> Result<Bands> {
    if word(record, 1) != MAGIC {
        return Err(Error::Data("the arena has no bases, or is of another version".into()));
    }
    let h = &g.layers[layer];
    let (k, v) = (basis::widths_of(k), basis::widths_of(v));
    let mut bands = [(0, 0, waiting_form(h, g.waiting_bits)); BANDS];
    for (band, place) in bands.iter_mut().enumerate() {
        if k[band].rank() > h.d_k || v[band].rank() > h.d_v {
            return Err(Error::Data(format!("head {head} has more coefficients than elements")));
        }
        let (form, offset) = (TileForm::new(k[band], v[band], h.d_k, h.d_v, Fine::Residuals), word(record, OFFSETS + band) as usize);
        if offset + form.bytes() > g.block_bytes[band] {
            return Err(Error::Data(format!("the pieces of head {head} are longer than a tile")));
        }
        *place = (g.band_offset(band) + offset, g.block_bytes[band], form);
    }
    Ok(bands)
}

/// Bases of K and V in some form that a head's stored ones are read into.
pub trait HeadBasis: Default {
    /// Read stored bases; `to_encode` says whether rows will be coded in them.
    fn load(&mut self, stored: (&[u8], &[u8]), h: &Heads, to_encode: bool) -> Result<()>;
    /// Take bases that are not stored.
    fn set(&mut self, k: Basis, v: Basis);
}

impl HeadBasis for (Basis, Basis) {
    fn load(&mut self, (k, v): (&[u8], &[u8]), h: &Heads, to_encode: bool) -> Result<()> {
        self.0.load(k, h.d_k, to_encode)?;
        self.1.load(v, h.d_v, to_encode)
    }
    fn set(&mut self, k: Basis, v: Basis) {
        *self = (k, v);
    }
}

impl HeadBasis for HeadBases {
    fn load(&mut self, stored: (&[u8], &[u8]), h: &Heads, _to_encode: bool) -> Result<()> {
        HeadBases::load(self, stored, h.d_k, h.d_v)
    }
    fn set(&mut self, k: Basis, v: Basis) {
        *self = HeadBases::of(simd::kernels(), k, v);
    }
}

/// What a head's tiles are coded in, for each kind of [`Bases`].
#[derive(Default)]
pub struct AllBases<B = (Basis, Basis)>([B; 3]);

impl<B: HeadBasis> AllBases<B> {
    /// Read stored bases, fitted and former ones, and those of rows that wait in so many bits, as far as they are there: what is empty is not.
    pub fn read(&mut self, h: &Heads, [fitted, former]: [&[u8]; 2], (plain, bits): (&[u8], u32), to_encode: bool) -> Result<()> {
        let k_bytes = [basis::bytes_of(h.d_k), basis::decoder_bytes_of(h.d_k)];
        let both = [(fitted, Bases::Fitted, to_encode), (former, Bases::Former, false)];
        for ((stored, which, to_encode), k_bytes) in both.into_iter().zip(k_bytes) {
            if !stored.is_empty() {
                self.0[which as usize].load(stored.split_at(k_bytes), h, to_encode)?;
            }
        }
        if !plain.is_empty() {
            let (k, v) = self::plain(h, plain, bits);
            self.0[Bases::Plain as usize].set(k, v);
        }
        Ok(())
    }
}

impl AllBases {
    /// Read a head's. What rows wait in is always there; `fitted` and `former` say whether the others are, and `to_encode` whether rows will be coded in
    /// those that were fitted last.
    pub fn load(
        &mut self,
        g: &Geometry,
        h: &Heads,
        bytes: &impl Bytes,
        r: &HeadRanges,
        (fitted, former): (bool, bool),
        to_encode: bool,
    ) -> Result<()> {
        let fitted = if fitted { bytes.get(r.bases.clone()) } else { &[] };
        let former = if former { bytes.get(r.former_bases()) } else { &[] };
        self.read(h, [fitted, former], (bytes.get(r.plain.clone()), g.waiting_bits), to_encode)
    }

    /// Those of a kind of tile.
    pub fn of(&self, kind: Kind) -> (&Basis, &Basis) {
        let (k, v) = &self.0[bases_of(kind) as usize];
        (k, v)
    }
}

impl AllBases<HeadBases> {
    /// Those of a kind of tile.
    pub fn of(&self, kind: Kind) -> &HeadBases {
        &self.0[bases_of(kind) as usize]
    }
}

/// Exact rows of one head.
#[derive(Clone, Copy)]
pub struct ExactRows<'a> {
    rows: &'a [f16],
    row: usize,
}

impl<'a> ExactRows<'a> {
    /// `exact` is a head's range.
    pub fn new(h: &Heads, exact: &'a [u8]) -> Result<Self> {
        Ok(ExactRows { rows: f16s(exact)?, row: h.elements() })
    }
    /// Key and value of a slot, one after the other.
    pub fn row(&self, slot: usize) -> &'a [f16] {
        &self.rows[slot * self.row..(slot + 1) * self.row]
    }
}

/// Mutable [`ExactRows::row`].
pub fn exact_row_mut<'a>(h: &Heads, exact: &'a mut [u8], slot: usize) -> Result<&'a mut [f16]> {
    f16s_mut(&mut exact[slot * h.row_bytes()..(slot + 1) * h.row_bytes()])
}

/// Write a query of the group `group` to slot `slot` of `slots`: as whole numbers in proportion to its largest element. `kept` has the queries of a
/// KV head, all scales first.
pub fn put_query(kept: &mut [u8], (slots, group): (usize, usize), slot: usize, query: &[f32]) {
    let (scales, codes) = kept.split_at_mut(4 * slots * group);
    let (d, at) = (query.len() / group, slot * group);
    for ((x, scale), codes) in query.chunks_exact(d).zip(scales[4 * at..].chunks_exact_mut(4)).zip(codes[at * d..].chunks_exact_mut(d)) {
        let largest = x.iter().fold(f32::MIN_POSITIVE, |a, x| a.max(x.abs())) / 127.0;
        scale.copy_from_slice(&largest.to_le_bytes());
        codes.iter_mut().zip(x).for_each(|(code, x)| *code = (x / largest).round() as i8 as u8);
    }
}

/// What [`put_query`] wrote.
pub fn query(kept: &[u8], (slots, group): (usize, usize), slot: usize, out: &mut [f32]) {
    let (scales, codes) = kept.split_at(4 * slots * group);
    let (d, at) = (out.len() / group, slot * group);
    for ((out, scale), codes) in out.chunks_exact_mut(d).zip(scales[4 * at..].chunks_exact(4)).zip(codes[at * d..].chunks_exact(d)) {
        let scale = f32::from_le_bytes(scale.try_into().expect("invariant: four bytes"));
        out.iter_mut().zip(codes).for_each(|(out, code)| *out = scale * f32::from(*code as i8));
    }
}

/// The queries for a fit, and the squared norms of the residual stream behind them; `kept` is a head's range of queries.
pub fn queries_mut(kept: &mut [u8]) -> Result<(&mut [u8], &mut [f32])> {
    let (queries, norms) = kept.split_at_mut(kept.len() - 4 * QUERY_SLOTS);
    let norms = bytemuck::try_cast_slice_mut(norms).map_err(|e| Error::Data(format!("norms are not aligned: {e}")))?;
    Ok((queries, norms))
}

/// [`queries_mut`], to read.
pub fn queries(kept: &[u8]) -> Result<(&[u8], &[f32])> {
    let (queries, norms) = kept.split_at(kept.len() - 4 * QUERY_SLOTS);
    let norms = bytemuck::try_cast_slice(norms).map_err(|e| Error::Data(format!("norms are not aligned: {e}")))?;
    Ok((queries, norms))
}

/// What waiting rows are coded relative to, in so many bits: mean and scale of keys, scale of values. Zeros before the first tile of them.
pub fn plain(h: &Heads, bytes: &[u8], bits: u32) -> (Basis, Basis) {
    let float = |b: &[u8]| f32::from_le_bytes(b.try_into().expect("invariant: four bytes"));
    let all: Vec<f32> = bytes.chunks_exact(4).map(float).collect();
    let (mean, scales) = all.split_at(h.d_k);
    (Basis::diagonal(mean, &scales[..h.d_k], bits), Basis::diagonal(&[], &scales[h.d_k..h.d_k + h.d_v], bits))
}

/// Set [`plain`].
pub fn set_plain(bytes: &mut [u8], mean: &[f32], scale_k: &[f32], scale_v: &[f32]) {
    let all = mean.iter().chain(scale_k).chain(scale_v);
    bytes.chunks_exact_mut(4).zip(all).for_each(|(to, x)| to.copy_from_slice(&x.to_le_bytes()));
}

/// The ranges of all heads of a layer.
pub fn heads(g: &Geometry, layer: usize) -> Vec<HeadRanges> {
    (0..g.layers[layer].n_head_kv).map(|head| g.head(layer, head)).collect()
}
