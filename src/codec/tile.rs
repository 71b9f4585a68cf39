//! Coding the rows of tiles, and what codes stand for. Bytes of a tile: [`crate::layout::tile`].
//!
//! A residual is coded in units of its coefficients' importance. Whole tiles are coded and decoded by products of matrices, single rows by themselves:
//! sums of the two differ in their last bits. Must not know where tiles lie.

use super::Basis;
use crate::layout::row::Taken;
use crate::layout::{gain, quant, Fine, Side, TileForm, FINE_ROWS, TILE};
use crate::simd::{code_row, Kernels, MatMut, MatRef};

/// Memory to code tiles in.
#[derive(Debug, Default)]
pub struct TileWork {
    /// Coefficients of the rows, all of them.
    z: Vec<[f32; TILE]>,
    /// The rows less their mean, or what they are decoded from, transposed.
    columns: Vec<f32>,
    /// Rows that were decoded.
    rows: Vec<f32>,
    /// All coefficients of one row, and of another.
    row: [Vec<f32>; 2],
}

impl TileWork {
    /// Room for coefficients of rows of `d` elements, all of them zero.
    fn clear(&mut self, d: usize) {
        self.z.clear();
        self.z.resize(d, [0.0; TILE]);
        self.row.iter_mut().for_each(|row| row.resize(d, 0.0));
    }
}

/// `out = x` less the mean.
fn centre(basis: &Basis, x: &[f32], out: &mut [f32]) {
    out.copy_from_slice(x);
    out.iter_mut().zip(&basis.mean).for_each(|(x, mean)| *x -= mean);
}

/// Code 64 rows of keys and of values, some of which may be fine.
#[expect(clippy::too_many_arguments, reason = "rows, what codes them and where they go")]
pub fn encode_tile(
    kernels: &Kernels,
    bases: (&Basis, &Basis),
    form: &TileForm,
    rows_k: &[f32],
    rows_v: &[f32],
    fine: &[u8],
    tile: &mut [u8],
    work: &mut TileWork,
) {
    form.mark(tile, fine);
    for (basis, side, rows) in [(bases.0, &form.k, rows_k), (bases.1, &form.v, rows_v)] {
        work.clear(side.d);
        project(kernels, basis, side, rows, form.slots(tile).map(|(_, row)| row), work);
        code(kernels, basis, form, side, tile, work);
    }
}

/// Coefficients of rows: those that are coded, and of fine rows the others as well.
fn project(kernels: &Kernels, basis: &Basis, side: &Side, rows: &[f32], fine: impl Iterator<Item = usize>, work: &mut TileWork) {
    let (d, rank) = (side.d, side.widths.rank());
    work.columns.resize(d * TILE, 0.0);
    (kernels.transpose)(MatRef::new(rows, d), MatMut::new(&mut work.columns, TILE), TILE, d);
    for (column, mean) in work.columns.chunks_exact_mut(TILE).zip(&basis.mean) {
        column.iter_mut().for_each(|x| *x -= mean);
    }
    let z = MatMut::new(work.z.as_flattened_mut(), TILE);
    (kernels.multiply)(MatRef::new(&basis.encode, d), MatRef::new(&work.columns, TILE), z, rank, d, TILE);
    for row in fine {
        let [x, rest] = &mut work.row;
        centre(basis, &rows[row * d..(row + 1) * d], x);
        (kernels.dots)(MatRef::new(x, d), MatRef::new(&basis.encode[rank * d..], d), MatMut::new(rest, d), 1, d, d - rank);
        work.z[rank..].iter_mut().zip(rest).for_each(|(z, x)| z[row] = *x);
    }
}

/// Gains and codes of the coefficients in `work`, and residuals of the rows that are marked.
fn code(kernels: &Kernels, basis: &Basis, form: &TileForm, side: &Side, tile: &mut [u8], work: &mut TileWork) {
    for (_, part) in side.some_parts() {
        let (gains, codes) = part.split_mut(tile);
        (kernels.quantise)(part.widths, &basis.weight[part.range()], &work.z[part.range()], gains, codes);
    }
    if form.fine == Fine::Marks {
        return;
    }
    for slot in 0..FINE_ROWS {
        let Some(row) = form.slots(tile).find(|(used, _)| *used == slot).map(|(_, row)| row) else { continue };
        let [residual, coded] = &mut work.row;
        coded.fill(0.0);
        row_coefficients(side, tile, row, coded);
        for (j, residual) in residual.iter_mut().enumerate() {
            *residual = (work.z[j][row] - coded[j]) * basis.weight[j].sqrt();
        }
        form.put_residual(side, slot, tile, |nibbles| (kernels.quantise_fine)(residual, nibbles));
    }
}

/// The coefficients of one row that are coded.
fn row_coefficients(side: &Side, tile: &[u8], row: usize, out: &mut [f32]) {
    for (_, part) in side.some_parts() {
        let (gain, codes) = (gain::gain(part.gains(tile)[row]), part.codes(tile));
        for (j, out) in out[part.range()].iter_mut().enumerate() {
            let (width, at) = part.widths.place(j);
            *out = gain * quant::level(width, quant::get(width, &codes[at..], row));
        }
    }
}

/// What a residual adds to the coefficients of its row.
fn residual_coefficients(kernels: &Kernels, basis: &Basis, step: f32, nibbles: &[u8], out: &mut [f32]) {
    (kernels.unpack_fine)(nibbles, step, out);
    out.iter_mut().zip(&basis.weight).for_each(|(x, weight)| *x /= weight.sqrt());
}

/// Coded coefficients of all rows of a tile; of what is not coded, `z` stays as it was.
pub(crate) fn coefficients(kernels: &Kernels, side: &Side, tile: &[u8], z: &mut [[f32; TILE]]) {
    let mut gains = [0.0; TILE];
    for (_, part) in side.some_parts() {
        let z = &mut z[part.range()];
        (kernels.unpack)(part.widths, part.codes(tile), z);
        (kernels.lookup)(gain::gains(), part.gains(tile), &mut gains);
        z.iter_mut().for_each(|z| z.iter_mut().zip(&gains).for_each(|(z, gain)| *z *= gain));
    }
}

/// Rebuild rows of one side that `wanted` has a bit for; `work` was cleared.
#[expect(clippy::too_many_arguments, reason = "a tile, what codes it and where its rows go")]
fn decode_side(kernels: &Kernels, basis: &Basis, form: &TileForm, side: &Side, tile: &[u8], wanted: u64, out: &mut [f32], work: &mut TileWork) {
    let (d, rank) = (side.d, side.widths.rank());
    coefficients(kernels, side, tile, &mut work.z);
    work.columns.resize(TILE * d, 0.0);
    (kernels.transpose)(MatRef::new(work.z.as_flattened(), TILE), MatMut::new(&mut work.columns, d), rank, TILE);
    let mut row = 0;
    while row < TILE {
        let n = (!(wanted >> row)).trailing_zeros() as usize;
        let n = n.min(TILE - row);
        let out = &mut out[row * d..(row + n) * d];
        if basis.mean.is_empty() {
            out.fill(0.0);
        } else {
            out.chunks_exact_mut(d).for_each(|out| out.copy_from_slice(&basis.mean));
        }
        (kernels.multiply)(MatRef::new(&work.columns[row * d..], d), MatRef::new(&basis.decode, d), MatMut::new(out, d), n, rank, d);
        row += n.max(1);
    }
    for (row, step, nibbles) in form.residuals(side, tile).filter(|(row, ..)| wanted >> row & 1 == 1) {
        residual_coefficients(kernels, basis, step, nibbles, &mut work.row[0]);
        (kernels.accumulate)(&basis.decode, &work.row[0], &mut out[row * d..(row + 1) * d]);
    }
}

/// Rebuild the rows of a tile that `wanted` has a bit for, keys in their frame: row `i` goes to the `i`th `d` floats.
#[expect(clippy::too_many_arguments, reason = "a tile, what codes it and where its rows go")]
pub fn decode_tile(
    kernels: &Kernels,
    bases: (&Basis, &Basis),
    form: &TileForm,
    tile: &[u8],
    wanted: u64,
    out_k: &mut [f32],
    out_v: &mut [f32],
    work: &mut TileWork,
) {
    for (basis, side, out) in [(bases.0, &form.k, out_k), (bases.1, &form.v, out_v)] {
        work.clear(side.d);
        decode_side(kernels, basis, form, side, tile, wanted, out, work);
    }
}

/// A tile that is read: bases of K and V, form and bytes.
pub type Coded<'a> = ((&'a Basis, &'a Basis), &'a TileForm, &'a [u8]);
/// A tile that is written.
pub type CodedMut<'a> = ((&'a Basis, &'a Basis), &'a TileForm, &'a mut [u8]);

/// Code the rows of a tile again in another form, or in other bases. Fine rows stay so. Where the basis is the same object, coefficients are taken as
/// they are.
pub fn recode_tile(kernels: &Kernels, from: Coded, to: CodedMut, work: &mut TileWork) {
    let (from_bases, from_form, source) = from;
    let (to_bases, to_form, target) = to;
    to_form.mark(target, &from_form.fine_rows(source));
    let pairs = [(from_bases.0, &from_form.k, to_bases.0, &to_form.k), (from_bases.1, &from_form.v, to_bases.1, &to_form.v)];
    for (old, old_side, new, side) in pairs {
        work.clear(side.d);
        if std::ptr::eq(old, new) {
            coefficients(kernels, old_side, source, &mut work.z);
            for (row, step, nibbles) in from_form.residuals(old_side, source) {
                residual_coefficients(kernels, old, step, nibbles, &mut work.row[0]);
                work.z.iter_mut().zip(&work.row[0]).for_each(|(z, x)| z[row] += x);
            }
        } else {
            let mut rows = std::mem::take(&mut work.rows);
            rows.resize(TILE * side.d, 0.0);
            decode_side(kernels, old, from_form, old_side, source, u64::MAX, &mut rows, work);
            work.clear(side.d);
            project(kernels, new, side, &rows, to_form.slots(target).map(|(_, row)| row), work);
            work.rows = rows;
        }
        code(kernels, new, to_form, side, target, work);
    }
}

/// Code one row of an existing tile as [`encode_tile`] does with all; it is not fine, whatever was there before.
#[expect(clippy::too_many_arguments, reason = "a row, what codes it and where it goes")]
pub fn encode_row(
    kernels: &Kernels,
    bases: (&Basis, &Basis),
    form: &TileForm,
    k: &[f32],
    v: &[f32],
    row: usize,
    tile: &mut [u8],
    work: &mut TileWork,
) {
    form.unmark(tile, row);
    for (basis, side, x) in [(bases.0, &form.k, k), (bases.1, &form.v, v)] {
        let d = side.d;
        work.clear(d);
        let [centred, z] = &mut work.row;
        centre(basis, x, centred);
        (kernels.dots)(MatRef::new(centred, d), MatRef::new(&basis.encode, d), MatMut::new(z, d), 1, d, side.widths.rank());
        for (_, part) in side.some_parts() {
            let (gains, codes) = part.split_mut(tile);
            let z = &z[part.range()];
            gains[row] = code_row(part.widths, &basis.weight[part.range()], z, |j, code| {
                let (width, at) = part.widths.place(j);
                quant::put(width, &mut codes[at..], row, code);
            });
        }
    }
}

/// The row that [`TileForm::take_row`]'s bytes stand for: `d_k` then `d_v` floats, the key in its frame.
pub fn decode_row(kernels: &Kernels, bases: (&Basis, &Basis), form: &TileForm, taken: &[u8], out: &mut [f32]) {
    let Taken { is_fine, gains, mut codes, residual } = Taken::of(form, taken);
    let mut gains = gains.iter();
    let (out_k, out_v) = out.split_at_mut(form.k.d);
    for (basis, side, out) in [(bases.0, &form.k, out_k), (bases.1, &form.v, out_v)] {
        let mut z = vec![0.0; side.d];
        if form.fine == Fine::Residuals && is_fine {
            let (step, nibbles) = form.of_residual(side, residual);
            residual_coefficients(kernels, basis, step, nibbles, &mut z);
        }
        for (_, part) in side.some_parts() {
            let gain = gain::gain(*gains.next().expect("invariant: a taken row has a gain for every part"));
            for (j, z) in z[part.range()].iter_mut().enumerate() {
                let width = part.widths.place(j).0;
                *z += gain * quant::level(width, codes.get(width));
            }
        }
        out.fill(0.0);
        out.iter_mut().zip(&basis.mean).for_each(|(out, mean)| *out = *mean);
        (kernels.accumulate)(&basis.decode, &z, out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{Widths, BANDS, NO_ROW};
    use crate::simd::{at, kernels, Level};

    fn noise(n: usize, seed: usize) -> Vec<f32> {
        let one = |i: usize, k: usize| ((i * 7919 + seed * 104_729 + k * 31_337) as f64 * 0.618_034).fract() as f32 - 0.5;
        (0..n).map(|i| (0..4).map(|k| one(i, k)).sum::<f32>() * 1.7).collect()
    }

    const D: usize = 32;

    fn widths(counts: [usize; 7]) -> Widths {
        Widths { counts }
    }

    fn deviation(j: usize) -> f32 {
        2.0 * 0.9f32.powi(j as i32)
    }

    /// Unit vectors, in the other direction if turned.
    fn basis(widths: [Widths; BANDS], mean: Vec<f32>, turned: bool) -> Basis {
        let place = |j: usize| if turned { D - 1 - j } else { j };
        let unit =
            |scale: &dyn Fn(usize) -> f32| -> Vec<f32> { (0..D * D).map(|i| if place(i / D) == i % D { scale(i % D) } else { 0.0 }).collect() };
        let weight = (0..D).map(|j| (deviation(place(j)) / deviation(0)).powi(2)).collect();
        Basis { d: D, widths, mean, encode: unit(&|j| 1.0 / deviation(j)), decode: unit(&deviation), weight }
    }

    /// Ranks of K and V cross: K has more in the first band, V in the last.
    const BANDS_K: [[usize; 7]; 3] = [[2, 3, 2, 4, 6, 6, 5], [0, 1, 2, 3, 3, 3, 2], [0, 0, 0, 1, 2, 2, 1]];
    const BANDS_V: [[usize; 7]; 3] = [[0, 0, 1, 1, 2, 2, 1], [0, 0, 1, 2, 4, 5, 6], [0, 0, 0, 2, 5, 9, 14]];

    fn bases() -> (Basis, Basis) {
        (basis(BANDS_K.map(widths), noise(D, 1), false), basis(BANDS_V.map(widths), vec![], false))
    }

    fn form(band: usize) -> TileForm {
        TileForm::new(widths(BANDS_K[band]), widths(BANDS_V[band]), D, D, Fine::Residuals)
    }

    /// Rows of K and V, of sizes that differ.
    fn rows(mean: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let size = |row: usize| (0.05 * (row as f32 - 32.0)).exp();
        let draw = |seed: usize, mean: &[f32]| -> Vec<f32> {
            let add = |i: usize| mean.get(i % D).copied().unwrap_or(0.0);
            noise(TILE * D, seed).iter().enumerate().map(|(i, x)| x * deviation(i % D) * size(i / D) + add(i)).collect()
        };
        (draw(3, mean), draw(4, &[]))
    }

    fn decode(bases: (&Basis, &Basis), form: &TileForm, tile: &[u8]) -> (Vec<f32>, Vec<f32>) {
        let (mut k, mut v) = (vec![f32::NAN; TILE * D], vec![f32::NAN; TILE * D]);
        decode_tile(kernels(), bases, form, tile, u64::MAX, &mut k, &mut v, &mut TileWork::default());
        (k, v)
    }

    /// Relative error of a row, less the mean.
    fn error(got: &[f32], want: &[f32], mean: &[f32], row: usize) -> f64 {
        let (mut error, mut size) = (0.0, 0.0);
        for j in row * D..(row + 1) * D {
            error += f64::from(got[j] - want[j]).powi(2);
            size += f64::from(want[j] - mean.get(j % D).copied().unwrap_or(0.0)).powi(2);
        }
        (error / size.max(1e-30)).sqrt()
    }

    #[test]
    fn a_tile_is_coded_as_its_rows_are() {
        let (k, v) = bases();
        let (rows_k, rows_v) = rows(&k.mean);
        for band in 0..BANDS {
            let form = form(band);
            let (mut whole, mut single, mut work) = (vec![0xa5; form.bytes()], vec![0xa5; form.bytes()], TileWork::default());
            encode_tile(kernels(), (&k, &v), &form, &rows_k, &rows_v, &[], &mut whole, &mut work);
            for row in 0..TILE {
                let own = |rows: &[f32]| rows[row * D..(row + 1) * D].to_vec();
                encode_row(kernels(), (&k, &v), &form, &own(&rows_k), &own(&rows_v), row, &mut single, &mut work);
            }
            // Rounding may choose another of two levels that are equally near.
            let other = (0..TILE).filter(|row| form.take_row(&whole, *row) != form.take_row(&single, *row)).count();
            assert!(other <= 1, "band {band}: {other} rows");
        }
    }

    #[test]
    fn a_row_taken_is_the_row_that_was_there() {
        let (k, v) = bases();
        let (rows_k, rows_v) = rows(&k.mean);
        for (form, bases) in [
            (form(0), (&k, &v)),
            (form(2), (&k, &v)),
            (TileForm::new(widths([0; 7]), widths([0, 0, 0, 0, 0, 0, 3]), D, D, Fine::Residuals), (&k, &v)),
            (TileForm::new(widths([D, 0, 0, 0, 0, 0, 0]), widths([D, 0, 0, 0, 0, 0, 0]), D, D, Fine::Marks), (&k, &v)),
        ] {
            let (mut tile, mut work) = (vec![0xa5; form.bytes()], TileWork::default());
            encode_tile(kernels(), bases, &form, &rows_k, &rows_v, &[9, 3], &mut tile, &mut work);
            let (got_k, got_v) = decode(bases, &form, &tile);
            let mut copy = vec![0x5a; form.bytes()];
            form.mark(&mut copy, &[]);
            for row in 0..TILE {
                let taken = form.take_row(&tile, row);
                assert_eq!(form.taken_bytes(taken[0]), Some(taken.len()));
                assert_eq!(taken[0] == 1, [9, 3].contains(&row));
                let mut out = vec![f32::NAN; 2 * D];
                decode_row(kernels(), bases, &form, &taken, &mut out);
                let want = [&got_k[row * D..(row + 1) * D], &got_v[row * D..(row + 1) * D]].concat();
                assert!(out.iter().zip(&want).all(|(a, b)| (a - b).abs() <= 1e-5 * (1.0 + b.abs())), "row {row}");
                form.put_row(&mut copy, row, &taken);
                assert_eq!(form.take_row(&copy, row), taken, "row {row}");
            }
            assert_eq!(form.fine_rows(&tile), [9, 3]);
            assert_eq!(decode(bases, &form, &copy), (got_k, got_v));
            assert_eq!(form.taken_bytes(2), None);
            // A third fine row finds no place, and takes one when its row had it; coded anew, a row is fine no longer.
            let taken = form.take_row(&tile, 9);
            form.put_row(&mut copy, 20, &taken);
            assert_eq!((form.fine_rows(&copy), form.take_row(&copy, 20)[0]), ([3, 9], 0));
            form.put_row(&mut copy, 3, &taken);
            assert_eq!(form.fine_rows(&copy), [3, 9]);
            encode_row(kernels(), bases, &form, &rows_k[..D], &rows_v[..D], 9, &mut copy, &mut work);
            assert_eq!(form.fine_rows(&copy), [3, NO_ROW]);
        }
    }

    #[test]
    fn fine_rows_are_ten_times_as_near() {
        let (k, v) = bases();
        let (rows_k, rows_v) = rows(&k.mean);
        for level in Level::ALL.into_iter().filter_map(at) {
            for band in 0..BANDS {
                let form = form(band);
                let (mut tile, mut work) = (vec![0xa5; form.bytes()], TileWork::default());
                let (mut coarse, mut fine) = (0.0, 0.0);
                for pair in 0..TILE as u8 / 2 {
                    for (marks, sum) in [(&[][..], &mut coarse), (&[2 * pair, 2 * pair + 1][..], &mut fine)] {
                        encode_tile(level, (&k, &v), &form, &rows_k, &rows_v, marks, &mut tile, &mut work);
                        let (got_k, got_v) = decode((&k, &v), &form, &tile);
                        for row in [2 * usize::from(pair), 2 * usize::from(pair) + 1] {
                            *sum += error(&got_k, &rows_k, &k.mean, row).powi(2) + error(&got_v, &rows_v, &[], row).powi(2);
                        }
                    }
                }
                let less = (fine / coarse).sqrt();
                assert!(less < 0.13, "{:?} band {band}: {coarse} {fine} {less}", level.level);
            }
        }
    }

    #[test]
    fn tiles_are_coded_again_from_what_they_hold_and_keep_their_fine_rows() {
        let (k, v) = bases();
        let other = (basis(BANDS_K.map(widths), noise(D, 7), true), basis(BANDS_V.map(widths), vec![], true));
        let (rows_k, rows_v) = rows(&k.mean);
        let mut work = TileWork::default();
        for ((from, to), same) in [(0, 1), (1, 2), (0, 2), (2, 0)].into_iter().flat_map(|bands| [(bands, true), (bands, false)]) {
            let (old, new) = ((&k, &v), if same { (&k, &v) } else { (&other.0, &other.1) });
            let (from_form, to_form) = (form(from), form(to));
            let mut source = vec![0xa5; from_form.bytes()];
            encode_tile(kernels(), old, &from_form, &rows_k, &rows_v, &[40], &mut source, &mut work);
            let (old_k, old_v) = decode(old, &from_form, &source);
            let (mut got, mut want) = (vec![0xa5; to_form.bytes()], vec![0x5a; to_form.bytes()]);
            recode_tile(kernels(), (old, &from_form, &source), (new, &to_form, &mut got), &mut work);
            encode_tile(kernels(), new, &to_form, &old_k, &old_v, &[40], &mut want, &mut work);
            assert_eq!(to_form.fine_rows(&got), [40, NO_ROW]);
            let ((got_k, got_v), (want_k, want_v)) = (decode(new, &to_form, &got), decode(new, &to_form, &want));
            for row in 0..TILE {
                for (got, want, mean) in [(&got_k, &want_k, &new.0.mean[..]), (&got_v, &want_v, &[][..])] {
                    // Rounding may choose another of two levels that are equally near.
                    let apart = error(got, want, mean, row);
                    assert!(apart < 0.25, "{from} to {to}, same basis {same}, row {row}: {apart}");
                }
            }
            let near = (0..TILE).filter(|row| to_form.take_row(&got, *row) == to_form.take_row(&want, *row)).count();
            assert!(near >= TILE - 12, "{from} to {to}, same basis {same}: {near} rows are the same");
        }
    }

    #[test]
    fn rows_that_wait_keep_eight_bits_and_their_marks() {
        let scale: Vec<f32> = (0..D).map(|j| deviation(j) * 50.0).collect();
        let (mean, (k, v)) = (noise(D, 1), bases());
        let plain = (Basis::diagonal(&mean, &scale, 8), Basis::diagonal(&[], &scale, 8));
        let (rows_k, rows_v) = rows(&mean);
        let eight = plain.0.widths[0];
        let waiting = TileForm::new(eight, eight, D, D, Fine::Marks);
        assert_eq!(waiting.bytes(), (2 * (D + 1) * TILE + FINE_ROWS).next_multiple_of(8));
        let (mut tile, mut work) = (vec![0xa5; waiting.bytes()], TileWork::default());
        encode_tile(kernels(), (&plain.0, &plain.1), &waiting, &rows_k, &rows_v, &[0, 63], &mut tile, &mut work);
        let (got_k, got_v) = decode((&plain.0, &plain.1), &waiting, &tile);
        for row in 0..TILE {
            assert!(error(&got_k, &rows_k, &mean, row) < 0.02 && error(&got_v, &rows_v, &[], row) < 0.02, "row {row}");
        }
        let to = form(1);
        let mut target = vec![0xa5; to.bytes()];
        recode_tile(kernels(), ((&plain.0, &plain.1), &waiting, &tile), ((&k, &v), &to, &mut target), &mut work);
        assert_eq!(to.fine_rows(&target), [0, 63]);
        let (got_k, got_v) = decode((&k, &v), &to, &target);
        assert!((0..TILE).all(|row| error(&got_k, &rows_k, &k.mean, row) < 0.6 && error(&got_v, &rows_v, &[], row) < 0.6));
        assert!([0, 63].iter().all(|row| error(&got_k, &rows_k, &k.mean, *row) < 0.06 && error(&got_v, &rows_v, &[], *row) < 0.06));
    }
}
