//! Kernels of every level that this CPU has, against f64.

use super::*;
use crate::layout::{gain, quant, Widths, TILE};
use half::f16;

fn noise(n: usize, seed: u32) -> Vec<f32> {
    let mut s = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    (0..n)
        .map(|_| {
            s = s.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (s >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

fn levels() -> impl Iterator<Item = &'static Kernels> {
    Level::ALL.into_iter().filter_map(|level| {
        let kernels = at(level);
        if kernels.is_none() {
            println!("skipped: this CPU has no {level:?}");
        }
        kernels
    })
}

/// Largest error, in units of what `bound` says of the size of the terms.
fn worst(got: &[f32], want: impl Iterator<Item = (f64, f64)>) -> f64 {
    got.iter().zip(want).map(|(got, (want, bound))| (f64::from(*got) - want).abs() / bound.max(1e-30)).fold(0.0, f64::max)
}

#[test]
fn products_of_matrices_of_every_level_agree_with_f64() {
    for k in levels() {
        for (n, depth, m) in [(1, 2, 1), (4, 64, 128), (3, 80, 64), (7, 96, 50), (5, 33, 16), (6, 256, 72), (2, 0, 32)] {
            let (sa, sb, sc) = (depth + 3, m + 5, m + 1);
            let (a, b, start) = (noise(n * sa, 1), noise((depth + 1) * sb, 2), noise(n * sc, 3));
            let mut c = start.clone();
            (k.multiply)(MatRef::new(&a, sa), MatRef::new(&b, sb), MatMut::new(&mut c, sc), n, depth, m);
            let terms = |i: usize| (0..depth).map(move |j| (i / sc * sa + j, j * sb + i % sc));
            let want = (0..n * sc).map(|i| {
                let own = if i % sc < m { terms(i).map(|(x, y)| f64::from(a[x]) * f64::from(b[y])).collect() } else { vec![] };
                (f64::from(start[i]) + own.iter().sum::<f64>(), 1.0 + own.iter().map(|x| x.abs()).sum::<f64>())
            });
            assert!(worst(&c, want) < 1e-6, "{:?} {n} {depth} {m}", k.level);

            let (b, mut c) = (noise(m * sa, 4), start.clone());
            (k.dots)(MatRef::new(&a, sa), MatRef::new(&b, sa), MatMut::new(&mut c, sc), n, depth, m);
            let want = (0..n * sc).map(|i| match i % sc < m {
                true => {
                    let terms = (0..depth).map(|j| f64::from(a[i / sc * sa + j]) * f64::from(b[i % sc * sa + j]));
                    (terms.clone().sum(), terms.map(f64::abs).sum())
                }
                false => (f64::from(start[i]), 1.0),
            });
            assert!(worst(&c, want) < 1e-6, "{:?} {n} {depth} {m}", k.level);
        }
    }
}

#[test]
fn projections_of_every_level_agree_with_f64() {
    for k in levels() {
        for (n, d) in [(1, 64), (4, 128), (7, 80), (9, 33), (2, 256), (3, 1)] {
            let (mut matrix, mut rows) = (noise(d * d, 1), noise(n * d, 2));
            // Rows of very different sizes, and one that points where a row of the matrix does.
            matrix.chunks_exact_mut(d).zip(0..).for_each(|(row, i)| row.iter_mut().for_each(|x| *x *= 0.9f32.powi(i)));
            rows.iter_mut().for_each(|x| *x *= 30.0);
            rows[..d].copy_from_slice(&matrix[(d - 1) * d..]);
            let (mut by, mut work) = (Projection::default(), Lines::default());
            (k.hold)(&matrix, d, &mut by);
            let columns = d.div_ceil(2).next_multiple_of(lanes::LANES);
            let mut out = vec![f32::NAN; n * by.stride()];
            (k.project)(&by, &rows, n, columns, &mut out, &mut work);
            let product = |i: usize, j: usize| (0..d).map(|e| f64::from(rows[i * d + e]) * f64::from(matrix[j * d + e])).sum::<f64>();
            let length = |x: &[f32]| x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
            for (i, out) in out.chunks_exact(by.stride()).enumerate() {
                let want = (0..columns.min(d)).map(|j| (product(i, j), length(&rows[i * d..][..d]) * length(&matrix[j * d..][..d])));
                let bound = if k.level == Level::Avx512Vnni { 1e-4 } else { 1e-6 };
                assert!(worst(&out[..columns.min(d)], want) < bound, "{:?} {n} {d}", k.level);
            }
        }
    }
}

#[test]
fn a_matrix_that_is_shorter_than_said_is_refused() {
    for k in levels() {
        let short = || {
            let (a, b, mut c) = (vec![0.0; 4 * 16], vec![0.0; 16 * 31], vec![0.0; 4 * 32]);
            (k.multiply)(MatRef::new(&a, 16), MatRef::new(&b, 32), MatMut::new(&mut c, 32), 4, 16, 32);
        };
        assert!(std::panic::catch_unwind(short).is_err());
    }
}

/// Queries, codes and tiles of every width; also none of some widths.
const CASES: [[usize; 7]; 6] =
    [[3, 2, 4, 5, 3, 6, 7], [0, 0, 0, 0, 0, 40, 88], [0, 0, 1, 0, 0, 0, 0], [2, 1, 0, 0, 0, 0, 0], [0; 7], [0, 0, 9, 0, 7, 0, 1]];

fn codes(widths: Widths, seed: u32) -> Vec<u8> {
    let mut codes: Vec<u8> = noise(widths.bytes(), seed).iter().map(|x| (x * 128.0).floor() as i8 as u8).collect();
    // -128 is no 8-bit code.
    codes[..widths.counts[0] * 64].iter_mut().filter(|c| **c == 128).for_each(|c| *c = 1);
    codes
}

fn value(widths: Widths, codes: &[u8], j: usize, row: usize) -> f64 {
    let (width, at) = widths.place(j);
    f64::from(quant::level(width, quant::get(width, &codes[at..], row)))
}

/// Products with `n` queries in the second of two frames, for parts of these widths, and the queries of that frame.
fn products(k: &Kernels, parts: [Widths; 2], n: usize) -> (Products, [Vec<f32>; 2]) {
    let mut s =
        Products { n, frames: 2, frame: 1, means: noise(2 * n, 9), scale: 1.7, largest: vec![[-3.0; lanes::LANES]; n], ..Products::default() };
    let mut queries = [vec![], vec![]];
    for (part, widths) in parts.into_iter().enumerate() {
        let stride = widths.rank().next_multiple_of(16);
        let own = &mut s.parts[part];
        (own.widths, own.stride) = (widths, stride);
        own.z.resize((2 * n * stride + 64) * 4);
        // Queries differ in magnitude, as their coefficients do.
        let z = noise(2 * n * stride, 4 + part as u32);
        let z: Vec<f32> = z.iter().enumerate().map(|(i, z)| z * 0.97f32.powi((i % stride.max(1)) as i32) * 30.0).collect();
        own.z.floats_mut()[..2 * n * stride].copy_from_slice(&z);
        queries[part] = z[n * stride..].to_vec();
        (k.prepare)(&mut s, part);
    }
    (s, queries)
}

/// The worst error in the scores of two tiles, made of both parts and of what was there before.
fn score_error(k: &Kernels, parts: [Widths; 2], n: usize) -> f64 {
    const ROWS: usize = 2 * TILE;
    let (mut s, queries) = products(k, parts, n);
    let codes = parts.map(|widths| [3, 11].map(|seed| codes(widths, seed)));
    let gain = |part: usize, row: usize| 0.5 + row as f32 / 64.0 * (1.0 + part as f32);
    let gains = [0, 1].map(|part| [0, 1].map(|tile| std::array::from_fn(|row| gain(part, tile * TILE + row))));
    let stride = ROWS + 16;
    let before = noise(n * stride, 17);
    let mut out = before.clone();
    for part in 0..2 {
        let pass = Pass { part, add: part == 1, finish: part == 1 };
        (k.tile_scores)(&mut s, pass, &codes[part].each_ref().map(Vec::as_slice), &gains[part], &mut out, stride);
        if part == 0 {
            // What is left between the passes belongs to the scores.
            out.iter_mut().zip(&before).enumerate().filter(|(i, _)| i % stride < ROWS).for_each(|(_, (out, x))| *out += x);
        }
    }
    let mut error = 0.0f64;
    for q in 0..n {
        let (mean, scale) = (f64::from(s.means[n + q]), f64::from(s.scale));
        let want = (0..stride).map(|row| {
            if row >= ROWS {
                return (f64::from(before[q * stride + row]), 1e-9);
            }
            let (mut sum, mut power) = (mean + f64::from(before[q * stride + row]), mean.abs() + 1.0);
            for (part, widths) in parts.into_iter().enumerate() {
                let z = &queries[part][q * s.parts[part].stride..];
                let terms = (0..widths.rank()).map(|j| f64::from(z[j]) * value(widths, &codes[part][row / TILE], j, row % TILE));
                sum += f64::from(gain(part, row)) * terms.clone().sum::<f64>();
                power += f64::from(gain(part, row)) * terms.map(|x| x * x).sum::<f64>().sqrt();
            }
            (scale * sum, scale * power)
        });
        let scores = &out[q * stride..][..stride];
        error = error.max(worst(scores, want));
        assert_eq!((k.largest)(&s.largest[q]), scores[..ROWS].iter().copied().fold(-3.0, f32::max));
    }
    error
}

/// The worst error in sums of values over five tiles.
fn value_error(k: &Kernels, widths: Widths, n: usize, seed: u32) -> f64 {
    let (rank, mut work) = (widths.rank(), Products::default());
    let codes: Vec<Vec<u8>> = (0..5).map(|t| codes(widths, 3 + t)).collect();
    let p: Vec<f32> = noise(n * 5 * TILE, seed).iter().map(|x| (x * 6.0 - 6.0).exp()).collect();
    let mut sums = vec![0.125f32; rank * n * lanes::LANES];
    let tiles: Vec<&[u8]> = codes.iter().map(Vec::as_slice).collect();
    (k.tile_values)(widths, &tiles, &p, 5 * TILE, n, &mut sums, &mut work);
    let got: Vec<f32> = sums.chunks_exact(lanes::LANES).map(|l| l.iter().map(|x| f64::from(*x) - 0.125).sum::<f64>() as f32).collect();
    let want = (0..rank * n).map(|i| {
        let terms = (0..5 * TILE).map(|r| f64::from(p[i % n * 5 * TILE + r]) * value(widths, &codes[r / TILE], i / n, r % TILE));
        (terms.clone().sum(), terms.map(|x| x * x).sum::<f64>().sqrt() + 2.0)
    });
    worst(&got, want)
}

/// The worst errors of a level in scores and values over all cases, against f64.
fn tile_errors(k: &Kernels) -> [f64; 2] {
    let mut errors = [0.0f64; 2];
    for (case, counts) in CASES.into_iter().enumerate() {
        for n in [1, 2, 3, 4, 7, 9] {
            let widths = Widths { counts };
            for cut in [9, 4, 3] {
                errors[0] = errors[0].max(score_error(k, widths.parts(cut), n));
            }
            errors[1] = errors[1].max(value_error(k, widths, n, 8 + case as u32));
        }
    }
    errors
}

#[test]
fn tiles_of_every_level_agree_with_f64() {
    let plain = tile_errors(plain());
    assert!(plain.iter().all(|e| (1e-9..1e-5).contains(e)), "{plain:?}");
    for k in levels() {
        let errors = tile_errors(k);
        println!("{:?}: {errors:?}, plain f32 {plain:?}", k.level);
        // 16 bits of the largest of up to 320 factors, against the root of the summed squares of all terms.
        let bound = if k.level == Level::Avx512 { plain.map(|e| 2.0 * e) } else { [4e-4; 2] };
        assert!(errors.iter().zip(bound).all(|(e, bound)| *e <= bound), "{:?}: {errors:?} {plain:?}", k.level);
    }
}

#[test]
fn the_largest_sums_do_not_overflow() {
    for (k, rank) in levels().flat_map(|k| [(k, 512), (k, 513), (k, 1024)]) {
        let widths = Widths { counts: [0, 0, 0, rank, 0, 0, 0] };
        let codes = vec![255; widths.bytes()];
        let mut s = Products { n: 1, frames: 1, means: vec![0.0], scale: 1.0, largest: vec![[0.0; lanes::LANES]], ..Products::default() };
        (s.parts[0].widths, s.parts[0].stride) = (widths, rank);
        s.parts[0].z.resize((rank + 64) * 4);
        s.parts[0].z.floats_mut()[..rank].fill(2.0);
        (k.prepare)(&mut s, 0);
        let mut out = vec![0.0; TILE];
        (k.tile_scores)(&mut s, Pass { part: 0, add: false, finish: true }, &[&codes], &[[1.0; TILE]], &mut out, TILE);
        let want = 2.0 * value(widths, &codes, 0, 0);
        assert!(worst(&out, (0..TILE).map(|_| (want * rank as f64, want * rank as f64))) < 1e-5, "{:?} {rank}: {out:?}", k.level);
        let mut sums = vec![0.0; rank * lanes::LANES];
        (k.tile_values)(widths, &[codes.as_slice(); BATCH], &[2.0; BATCH * TILE], BATCH * TILE, 1, &mut sums, &mut s);
        let sum: f64 = sums[..lanes::LANES].iter().map(|x| f64::from(*x)).sum();
        assert!((sum / (want * (BATCH * TILE) as f64) - 1.0).abs() < 1e-5, "{:?}: {sum}", k.level);
    }
}

#[test]
fn unpacking_gives_the_levels_of_the_codes() {
    let widths = Widths { counts: CASES[0] };
    let codes = codes(widths, 5);
    for k in levels() {
        for n in [0, 1, 12, widths.rank()] {
            let mut out = vec![[0.0; TILE]; n];
            (k.unpack)(widths, &codes, &mut out);
            for (j, values) in out.iter().enumerate() {
                let want = (0..TILE).map(|row| (value(widths, &codes, j, row), 1.0));
                assert!(worst(values, want) < 1e-6, "{:?} {j}", k.level);
            }
        }
    }
}

#[test]
fn small_kernels_of_every_level_agree_with_f64() {
    for k in levels() {
        for d in [2usize, 64, 80, 96, 128, 250] {
            let (m, c, mut y) = (noise(7 * d, 1), noise(7, 2), vec![0.5f32; d]);
            (k.accumulate)(&m, &c, &mut y);
            let want = (0..d).map(|i| (0.5 + (0..7).map(|j| f64::from(c[j]) * f64::from(m[j * d + i])).sum::<f64>(), 4.0));
            assert!(worst(&y, want) < 1e-6);
            let halves: Vec<f16> = noise(d, 3).iter().map(|x| f16::from_f32(*x)).collect();
            (k.widen)(&halves, 0.75, &mut y);
            assert!(y.iter().zip(&halves).all(|(y, x)| *y == 0.75 * x.to_f32()));
        }
        for (n, m) in [(0, 3), (16, 16), (33, 20), (7, 48), (130, 128)] {
            let (sa, so) = (m + 3, n + 1);
            let (a, mut out) = (noise(n * sa, 10), vec![7.0; m * so]);
            (k.transpose)(MatRef::new(&a, sa), MatMut::new(&mut out, so), n, m);
            let want = |i: usize| if i % so < n { a[i % so * sa + i / so] } else { 7.0 };
            assert!(out.iter().enumerate().all(|(i, x)| *x == want(i)), "{:?} {n} {m}", k.level);
        }
        let (halves, mut y): (Vec<f16>, _) = ((0..=u16::MAX).map(f16::from_bits).collect(), vec![0.0; 1 << 16]);
        (k.widen)(&halves, 1.0, &mut y);
        // A NaN may become a quiet one.
        let same = |y: f32, x: f16| y.to_bits() == x.to_f32().to_bits() || y.is_nan() && x.is_nan();
        assert!(y.iter().zip(&halves).all(|(y, x)| same(*y, *x)), "{:?}", k.level);
        let mut x: Vec<f32> = noise(1001, 5).iter().map(|x| x * 90.0 - 90.0).collect();
        x[17] = f32::NEG_INFINITY;
        let want: Vec<f64> = x.iter().map(|x| f64::from(*x).exp()).collect();
        for n in [0, 1, 15, 16, 17, 64, 1001] {
            assert_eq!((k.largest)(&x[..n]), x[..n].iter().copied().fold(f32::NEG_INFINITY, f32::max));
        }
        let sum = (k.exp_sum)(&mut x, 0.0);
        for (x, w) in x.iter().zip(&want).filter(|(_, w)| **w > 1e-37) {
            assert!((f64::from(*x) / w - 1.0).abs() < 2e-5, "{x} {w}");
        }
        assert_eq!(x[17], 0.0);
        assert!((f64::from(sum) / want.iter().sum::<f64>() - 1.0).abs() < 1e-5);
    }
}

#[test]
fn kernels_for_the_rows_of_a_tile_of_every_level_agree_with_f64() {
    for k in levels() {
        let (x, gains) = (noise(TILE, 6), noise(TILE, 7));
        let (x, gains): ([f32; TILE], [f32; TILE]) = (x.try_into().unwrap(), gains.try_into().unwrap());
        for first in [0, 64, 128, 192] {
            let codes: [u8; TILE] = std::array::from_fn(|i| first + (i * 41 % TILE) as u8);
            let mut found = [f32::NAN; TILE];
            (k.lookup)(gain::gains(), &codes, &mut found);
            assert_eq!(found, codes.map(gain::gain), "{:?}", k.level);
        }
        for n in [1, 4, 6, 9] {
            let (lanes, mut sums) = (noise(n * 16, 8), vec![0.0; n]);
            (k.lane_sums)(&lanes, &mut sums);
            assert!(worst(&sums, lanes.chunks(16).map(|l| (l.iter().map(|x| f64::from(*x)).sum(), 16.0))) < 1e-7);
        }
        let mut weighed = [f32::NAN; TILE];
        let before = (k.weigh)(&x, &gains, &mut weighed);
        assert!(weighed.iter().zip(x.iter().zip(gains)).all(|(w, (x, g))| *w == x * g));
        assert!((f64::from(before) - x.iter().map(|x| f64::from(*x)).sum::<f64>()).abs() < 1e-5);

        let (cos, sin) = (&gains[..29], &gains[29..58]);
        let (mut adjacent, mut halves) = (x, x);
        (k.rotate_adjacent)(&mut adjacent[..58], cos, sin);
        let (a, b) = halves.split_at_mut(29);
        (k.rotate_halves)(a, &mut b[..29], cos, sin);
        for i in 0..29 {
            let turned = |a: f32, b: f32| {
                let [a, b, c, s] = [a, b, cos[i], sin[i]].map(f64::from);
                [a * c - b * s, b * c + a * s]
            };
            let got = [adjacent[2 * i], adjacent[2 * i + 1], halves[i], halves[i + 29]];
            let want = [turned(x[2 * i], x[2 * i + 1]), turned(x[i], x[i + 29])];
            assert!(worst(&got, want.into_iter().flatten().map(|w| (w, 1.0))) < 3e-7);
        }
        assert!(adjacent[58..] == x[58..] && halves[58..] == x[58..]);
    }
}

#[test]
fn cosines_and_sines_of_every_level_agree_with_f64() {
    let omega: Vec<f64> = (0..67).map(|i| 500_000f64.powf(-f64::from(i) / 67.0)).collect();
    for k in levels() {
        for delta in [0.0, 1.0, -1.0, 63.0, -4097.0, 131_071.0, -1_000_003.0, 2_147_483_647.0] {
            let (mut cos, mut sin) = (vec![0.0; 67], vec![0.0; 67]);
            (k.turn)(&omega, delta, &mut cos, &mut sin);
            for (i, w) in omega.iter().enumerate() {
                let (s, c) = (delta * w).sin_cos();
                assert!(
                    (f64::from(cos[i]) - c).abs() < 2e-7 && (f64::from(sin[i]) - s).abs() < 2e-7,
                    "{:?} {delta} {w}: {} {c} {} {s}",
                    k.level,
                    cos[i],
                    sin[i]
                );
            }
        }
    }
}

#[test]
fn a_level_that_cannot_be_had_is_refused_by_name() {
    for level in Level::ALL {
        let text = choose(Some(level.name())).map(|k| k.level).map_err(|e| e.to_string());
        match at(level) {
            Some(_) => assert_eq!(text, Ok(level)),
            None => assert!(text.unwrap_err().ends_with(&format!("={}: this CPU has no more than {}", level.name(), best().level.name()))),
        }
    }
    for name in ["avx", "AVX2", "avx2 ", "4"] {
        let text = choose(Some(name)).map(|k| k.level).unwrap_err().to_string();
        assert!(text.contains(&format!("{VARIABLE}={name}: ")) && text.ends_with("there are portable, avx2, avx512, avx512vnni, neon"), "{text}");
    }
    assert!([None, Some("")].into_iter().all(|name| choose(name).is_ok_and(|k| k.level == best().level)));
}
