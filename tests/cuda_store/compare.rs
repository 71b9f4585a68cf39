//! Two arenas after the same step, the CPU's and the device's: what may differ in them, and by how much. Knows bytes, and nothing of streams.

use spectral_kv::cache::arena::Pieces;
use spectral_kv::cache::plan::Change;
use spectral_kv::cache::{Geometry, Plan};
use spectral_kv::layout::{quant, Fine, TileForm, QUERY_SLOTS, TILE};
use std::collections::BTreeSet;

/// What was compared, and what was other.
#[derive(Debug, Default, Clone, Copy)]
pub struct Tally {
    pub codes: usize,
    pub other_codes: usize,
    pub gains: usize,
    pub other_gains: usize,
    pub nibbles: usize,
    pub other_nibbles: usize,
}

impl Tally {
    pub fn add(&mut self, t: &Tally) {
        self.codes += t.codes;
        self.other_codes += t.other_codes;
        self.gains += t.gains;
        self.other_gains += t.other_gains;
        self.nibbles += t.nibbles;
        self.other_nibbles += t.other_nibbles;
    }
}

/// Numbers of the tiles that a plan writes.
pub fn written(plan: &Plan) -> BTreeSet<usize> {
    let target = |change| match change {
        Change::Move { to, .. } => to / TILE,
        Change::Recode { to, .. } => to,
        Change::Seal { tile, .. } => tile,
    };
    plan.changes().map(target).collect()
}

/// Compare all bytes. Where nothing is computed they are the same.
pub fn compare(g: &Geometry, plan: &Plan, cpu: &[u8], device: &[u8]) -> Tally {
    assert_eq!(cpu.len(), device.len());
    let mut same = vec![true; cpu.len()];
    let mut tally = Tally::default();
    for (layer, heads) in g.layers.iter().enumerate() {
        for head in 0..heads.n_head_kv {
            let r = g.head(layer, head);
            let sealed = written(plan).into_iter().any(|t| (g.tiles..g.tiles + g.waiting).contains(&t));
            let plain = r.plain.start..r.plain.start + 4 * (2 * heads.d_k + heads.d_v);
            let norms = r.queries.end.saturating_sub(4 * QUERY_SLOTS)..r.queries.end;
            if sealed {
                let (channels, of_device) = (floats(&cpu[plain.clone()]), floats(&device[plain.clone()]));
                for (i, (a, b)) in channels.iter().zip(of_device).enumerate() {
                    // A mean is as exact as the rows that it is of.
                    let size = a.abs() + if i < 2 * heads.d_k { channels[(i + heads.d_k) % (2 * heads.d_k)].abs() } else { 0.0 };
                    assert!(a.to_bits() == b.to_bits() || (a - b).abs() <= 1e-6 * size, "layer {layer}, head {head}: channel {i} has {a} and {b}");
                }
                same[plain].fill(false);
            }
            if plan.records().len() > 0 {
                let pairs = floats(&cpu[norms.clone()]).into_iter().zip(floats(&device[norms.clone()]));
                pairs.for_each(|(a, b)| {
                    assert!(a.to_bits() == b.to_bits() || (a - b).abs() <= 1e-6 * a.abs(), "layer {layer}, head {head}: norms {a} and {b}")
                });
                same[norms].fill(false);
            }
            if plan.changes().next().is_none() {
                continue;
            }
            let pieces = Pieces::new(g, layer, head, &cpu, &r, plan.bases_to_store()).unwrap();
            for tile in written(plan) {
                let (kind, place) = pieces.place(tile);
                let words = format!("layer {layer}, head {head}, tile {tile}");
                let both = [&cpu[place.clone()], &device[place.clone()]];
                compare_tile(pieces.form(kind), both, &mut same[place], &mut tally, (apart(plan, tile), &words));
            }
        }
    }
    let other = (0..cpu.len()).find(|i| same[*i] && cpu[*i] != device[*i]);
    assert_eq!(other.map(|i| (i, cpu[i], device[i])), None, "a byte is other: {}", other.map_or(String::new(), |i| whose(g, i)));
    tally
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// Whose byte it is.
fn whose(g: &Geometry, at: usize) -> String {
    for (layer, heads) in g.layers.iter().enumerate() {
        for head in 0..heads.n_head_kv {
            let r = g.head(layer, head);
            let all =
                [("record", r.record), ("bases", r.bases), ("plain", r.plain), ("recent", r.recent), ("exact", r.exact), ("queries", r.queries)];
            if let Some((name, range)) = all.iter().find(|(_, range)| range.contains(&at)) {
                return format!("layer {layer}, head {head}, {name} from {} on", range.start);
            }
        }
    }
    format!("of the pool, whose bands begin at {:?}", [0, 1, 2].map(|band| g.band_offset(band)))
}

/// How far apart codes and gains of a tile may be: rounding chooses the one or the other of two that are nearly as near. What it chose in a tile that was coded
/// again in the same step makes more of a difference.
fn apart(plan: &Plan, tile: usize) -> u8 {
    let again = |change| matches!(change, Change::Recode { from, to } if to == tile && written(plan).contains(&from));
    if plan.changes().any(again) {
        4
    } else {
        1
    }
}

/// What a residual stands for, in units of importance.
fn residual(step: f32, nibbles: &[u8], d: usize) -> Vec<f32> {
    let half = d.div_ceil(2);
    (0..d).map(|j| step * quant::level(4, if j < half { nibbles[j] & 15 } else { nibbles[j - half] >> 4 })).collect()
}

fn compare_tile(form: &TileForm, [cpu, device]: [&[u8]; 2], same: &mut [bool], tally: &mut Tally, (most, words): (u8, &str)) {
    let mut other_rows = BTreeSet::new();
    for part in form.parts() {
        let (gains, codes) = ([part.gains(cpu), part.gains(device)], [part.codes(cpu), part.codes(device)]);
        for row in 0..TILE {
            let [a, b] = gains.map(|gains| gains[row]);
            assert!(a.abs_diff(b) <= most, "{words}, row {row}: gains {a} and {b}");
            tally.gains += 1;
            tally.other_gains += usize::from(a != b);
            for j in 0..part.rank() {
                let (width, at) = part.widths.place(j);
                let [a, b] = codes.map(|codes| quant::get(width, &codes[at..], row));
                let apart = if width == 8 { (a as i8).abs_diff(b as i8) } else { a.abs_diff(b) };
                assert!(apart <= most, "{words}, row {row}, coefficient {j} of {width} bits: {a} and {b}");
                tally.codes += 1;
                tally.other_codes += usize::from(a != b);
                if a != b {
                    other_rows.insert(row);
                }
            }
        }
    }
    let marks = form.residual(0).start - spectral_kv::layout::FINE_ROWS;
    same[..marks].fill(false);
    if form.fine == Fine::Marks {
        return;
    }
    same[form.residual(0).start..form.residual(1).end].fill(false);
    for (slot, row) in form.slots(cpu) {
        // What the other level leaves is another residual.
        if other_rows.contains(&row) {
            continue;
        }
        for side in [&form.k, &form.v] {
            let [(a, x), (b, y)] = [cpu, device].map(|tile| form.of_residual(side, &tile[form.residual(slot)]));
            let (x_of, y_of) = (residual(a, x, side.d), residual(b, y, side.d));
            let square = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>();
            let (apart, size) = (square(&mut x_of.iter().zip(&y_of).map(|(x, y)| x - y)), square(&mut x_of.iter().copied()));
            // Of few elements, two steps may do equally well: either leaves a hundredth or two.
            assert!(apart <= 0.06 * size, "{words}, row {row}: steps {a} and {b}, {apart} of {size}");
            if (a - b).abs() > 0.25 * a.abs().max(b.abs()) {
                continue;
            }
            tally.nibbles += side.d;
            tally.other_nibbles += x.iter().zip(y).map(|(a, b)| usize::from(a & 15 != b & 15) + usize::from(a >> 4 != b >> 4)).sum::<usize>();
        }
    }
    for slot in (0..spectral_kv::layout::FINE_ROWS).filter(|slot| form.slots(cpu).all(|(used, _)| used != *slot)) {
        assert_eq!(cpu[form.residual(slot)], device[form.residual(slot)], "{words}: a residual of nobody");
    }
}
