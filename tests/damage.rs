//! Damaged plans, states and arenas through the C interface: whatever is wrong with them, a call ends in a status and never in a crash or an internal
//! error. Built with overflow checks, an index that wraps is one.

use proptest::prelude::*;
use skv_status::*;
use spectral_kv::ffi::*;
use std::ffi::CStr;
use std::sync::OnceLock;

const N_LAYERS: usize = 2;
const N_HEAD: usize = 2;
const D: usize = 16;
/// Floats of a row of queries, and of one of keys or values.
const ROW: [usize; 2] = [N_HEAD * D, D];
const CELLS: usize = 3600;

fn filled<T>(init: unsafe extern "C" fn(*mut T, usize) -> skv_status) -> T {
    let mut out = std::mem::MaybeUninit::<T>::uninit();
    // SAFETY: as many bytes as are said are writable; then all of them are written.
    unsafe {
        assert_eq!(init(out.as_mut_ptr(), size_of::<T>()), SKV_STATUS_OK);
        out.assume_init()
    }
}

fn ok(status: skv_status) {
    // SAFETY: this thread's text, which no call replaces meanwhile.
    assert_eq!(status, SKV_STATUS_OK, "{:?}", unsafe { CStr::from_ptr(skv_last_error()) });
}

/// A refusal or not, but nothing else.
fn orderly(status: skv_status, what: &str) {
    // SAFETY: as above.
    assert_ne!(status, SKV_STATUS_PANIC, "{what}: {:?}", unsafe { CStr::from_ptr(skv_last_error()) });
}

/// Reproducible numbers.
fn noise(seed: u64) -> impl FnMut() -> f32 {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        x ^= x >> 12;
        x ^= x << 25;
        x ^= x >> 27;
        (x.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

/// The rows of a step: queries, keys and values.
struct Tokens {
    data: [Vec<f32>; 3],
    rows: [skv_rows; 3],
}

impl Tokens {
    fn new(seed: u64, n: usize) -> Box<Self> {
        let mut next = noise(seed);
        let spectrum = |i: usize| 1.5 * (-(i as f32) / 4.0).exp() + 0.05;
        let data = [ROW[0], ROW[1], ROW[1]].map(|row| (0..n * row).map(|i| next() * spectrum(i % D)).collect::<Vec<f32>>());
        let mut out = Box::new(Tokens { data, rows: std::array::from_fn(|_| filled(skv_rows_init)) });
        let data = out.data.each_ref().map(|x| x.as_ptr());
        for ((rows, data), row) in out.rows.iter_mut().zip(data).zip([ROW[0], ROW[1], ROW[1]]) {
            (rows.data, rows.n_rows, rows.row_stride, rows.head_stride) = (data, n, row * 4, D * 4);
        }
        out
    }
}

/// Arenas are made of these, so that they are aligned.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line([u64; 8]);

/// A stream with all that it is made of.
struct Stream {
    geometry: *mut skv_geometry,
    table: *mut skv_table,
    layers: [*mut skv_layer; N_LAYERS],
    arena: Vec<Line>,
    bytes: usize,
    pos: Vec<i32>,
    seq: Vec<i32>,
    next: usize,
    plan: Vec<i32>,
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: all of them are this stream's own.
        unsafe {
            skv_table_free(self.table);
            self.layers.iter().for_each(|l| skv_layer_free(*l));
            skv_geometry_free(self.geometry);
        }
    }
}

impl Stream {
    fn new() -> Self {
        let mut config = filled(skv_config_init);
        (config.n_cells, config.n_seqs, config.n_tokens, config.window, config.bits) = (CELLS as u32, 2, 64, 64, 6.0);
        let mut shape = filled(skv_layer_shape_init);
        (shape.n_head, shape.n_head_kv, shape.d_k, shape.d_v) = (N_HEAD as u32, 1, D as u32, D as u32);
        let mut rope = filled(skv_rope_init);
        (rope.pairing, rope.n_dims) = (SKV_PAIRING_HALVES, D as u32);
        let mut s = Stream {
            geometry: std::ptr::null_mut(),
            table: std::ptr::null_mut(),
            layers: [std::ptr::null_mut(); N_LAYERS],
            arena: Vec::new(),
            bytes: 0,
            pos: vec![-1; CELLS],
            seq: vec![-1; CELLS],
            next: 0,
            plan: Vec::new(),
        };
        // SAFETY: everything lives in this function or in the stream.
        unsafe {
            ok(skv_geometry_create(&config, [shape; N_LAYERS].as_ptr(), N_LAYERS, &mut s.geometry));
            ok(skv_geometry_arena_bytes(s.geometry, &mut s.bytes));
            ok(skv_table_create(s.geometry, &mut s.table));
            for i in 0..N_LAYERS {
                ok(skv_layer_create(s.geometry, i, &mut s.layers[i]));
                ok(skv_layer_set_rope(s.layers[i], &rope));
            }
        }
        s.arena = vec![Line([0; 8]); s.bytes.div_ceil(64)];
        s
    }

    fn cells(&self) -> skv_cells {
        let mut cells = filled(skv_cells_init);
        (cells.pos, cells.seq, cells.n_cells) = (self.pos.as_ptr(), self.seq.as_ptr(), CELLS);
        cells
    }

    /// Put tokens into the next cells and plan their step. Some cells are emptied on the way, so that there are holes.
    fn plan(&mut self, n: usize) -> skv_status {
        if self.next % 31 == 7 {
            (self.pos[self.next - 5], self.seq[self.next - 5]) = (-1, -1);
        }
        let new: Vec<u32> = (self.next..self.next + n).map(|c| c as u32).collect();
        for cell in self.next..self.next + n {
            (self.pos[cell], self.seq[cell]) = (cell as i32, 0);
        }
        let (mut most, mut used) = (0, 0);
        // SAFETY: all of it is there.
        unsafe {
            ok(skv_geometry_plan_ints(self.geometry, n, &mut most));
            self.plan = vec![0; most];
            let status = skv_table_plan(self.table, &self.cells(), new.as_ptr(), n, self.plan.as_mut_ptr(), most, &mut used);
            self.plan.truncate(used);
            status
        }
    }

    fn step(&self, arena: *mut u8, plan: &[i32], t: &Tokens) -> skv_step {
        let mut step = filled(skv_step_init);
        (step.arena, step.arena_bytes, step.plan, step.plan_ints) = (arena, self.bytes, plan.as_ptr(), plan.len());
        (step.q, step.k, step.v) = (&t.rows[0], &t.rows[1], &t.rows[2]);
        step
    }

    /// One whole step.
    fn append(&mut self, n: usize) {
        ok(self.plan(n));
        let t = Tokens::new(self.next as u64, n);
        let arena = self.arena.as_mut_ptr().cast();
        let step = self.step(arena, &self.plan, &t);
        // SAFETY: all of it is there.
        unsafe {
            self.layers.iter().for_each(|l| ok(skv_layer_append(*l, &step, 0, 1)));
            ok(skv_table_commit(self.table));
        }
        self.next += n;
    }

    /// Every call that takes a plan, with this one; storing on copies of an arena.
    fn all_calls(&self, arena: &[Line], plan: &[i32], n: usize, what: &str) {
        let (mut copy, t) = (arena.to_vec(), Tokens::new(n as u64, n));
        let step = self.step(copy.as_mut_ptr().cast(), plan, &t);
        let mask = vec![0u16; n * CELLS];
        let mut attention = filled(skv_attention_init);
        let mut floats = 0;
        let (mut out, mut k, mut v) = (vec![0.0; n * ROW[0]], vec![0u16; CELLS * D], vec![0u16; CELLS * D]);
        // SAFETY: all of it is there, and as long as is said.
        unsafe {
            ok(skv_layer_partial_floats(self.layers[0], n, &mut floats));
            let mut partials = vec![0.0; floats];
            (attention.partials, attention.n_partials, attention.out, attention.n_out) = (partials.as_mut_ptr(), floats, out.as_mut_ptr(), out.len());
            (attention.scale, attention.mask, attention.mask_row_stride, attention.n_kv) = (0.25, mask.as_ptr(), CELLS * 2, CELLS);
            for l in self.layers {
                orderly(skv_layer_attend(l, &step, &attention, 0, 1), &format!("attend, {what}"));
                orderly(skv_layer_prefill(l, &step, &attention, 0, 1), &format!("prefill, {what}"));
                orderly(skv_layer_reconstruct(l, &step, k.as_mut_ptr(), v.as_mut_ptr(), CELLS, 0, 1), &format!("reconstruct, {what}"));
                orderly(skv_layer_append(l, &step, 0, 1), &format!("append, {what}"));
                copy.copy_from_slice(arena);
                orderly(skv_layer_replay(l, &step), &format!("replay, {what}"));
                copy.copy_from_slice(arena);
            }
        }
    }

    fn stream(&mut self, layers: &[*const skv_layer]) -> skv_stream {
        let mut stream = filled(skv_stream_init);
        (stream.layers, stream.n_layers) = (layers.as_ptr(), N_LAYERS);
        (stream.arena, stream.arena_bytes) = (self.arena.as_mut_ptr().cast(), self.bytes);
        stream
    }

    /// The state of all rows, and their cells.
    fn save(&mut self) -> (Vec<u8>, Vec<u32>) {
        // Nothing is pending, and the table knows of rows that are gone.
        let next = std::mem::take(&mut self.next);
        ok(self.plan(0));
        self.next = next;
        let cells: Vec<u32> = (0..CELLS as u32).filter(|c| self.pos[*c as usize] >= 0).collect();
        let layers = self.layers.map(|l| l.cast_const());
        let (stream, mut size) = (self.stream(&layers), 0);
        // SAFETY: all of it is there.
        unsafe {
            ok(skv_state_write(self.table, &stream, cells.as_ptr(), cells.len(), std::ptr::null_mut(), 0, &mut size));
            let mut bytes = vec![0; size];
            ok(skv_state_write(self.table, &stream, cells.as_ptr(), cells.len(), bytes.as_mut_ptr(), size, &mut size));
            (bytes, cells)
        }
    }

    fn restore(&mut self, bytes: &[u8], cells: &[u32]) -> skv_status {
        for c in cells {
            (self.pos[*c as usize], self.seq[*c as usize]) = (*c as i32, 0);
        }
        self.next = cells.last().map_or(0, |c| *c as usize + 1);
        let layers = self.layers.map(|l| l.cast_const());
        let (stream, all) = (self.stream(&layers), self.cells());
        // SAFETY: all of it is there.
        unsafe { skv_state_read(self.table, &stream, &all, cells.as_ptr(), cells.len(), bytes.as_ptr(), bytes.len()) }
    }
}

/// A stream just before a step of some tokens, of which the plan is made.
struct Scene {
    name: &'static str,
    n: usize,
    stream: Stream,
}

// Calls on layers are for several threads; the tables are left alone once the plans are made.
// SAFETY: tests only read scenes, and layers may be used by all of them.
unsafe impl Sync for Scene {}
// SAFETY: the same.
unsafe impl Send for Scene {}

fn fits(s: &Stream) -> u64 {
    let mut stats = filled(skv_stats_init);
    // SAFETY: the layer lives.
    ok(unsafe { skv_layer_stats(s.layers[0], &mut stats) });
    stats.fits
}

/// Everything that a plan can be about: exact rows alone, rows that wait, heads looked at, a fit, codes, another fit, and what follows it.
fn scenes() -> &'static [Scene] {
    static SCENES: OnceLock<Vec<Scene>> = OnceLock::new();
    SCENES.get_or_init(|| {
        let mut out = Vec::new();
        let mut keep = |name, n, mut stream: Stream| {
            ok(stream.plan(n));
            out.push(Scene { name, n, stream });
        };
        let at = |rows: usize, step: usize| {
            let mut s = Stream::new();
            while s.next < rows {
                s.append(step.min(rows - s.next));
            }
            s
        };
        // Steps until `fits` have been made, or the step that makes the last of them is the next.
        let until = |wanted: u64, before: bool| {
            let mut s = Stream::new();
            while fits(&s) < wanted {
                ok(s.plan(1));
                if before && fits(&s) + 1 == wanted && s.plan[3] & 1 == 1 {
                    break;
                }
                s.append(1);
            }
            s
        };
        keep("one row", 1, at(1, 1));
        keep("exact rows", 3, at(60, 20));
        keep("rows that wait", 40, at(300, 50));
        let mut study = at(300, 50);
        while study.plan.get(15).is_none_or(|to| *to == 0) {
            study.append(1);
        }
        keep("a study", 1, study);
        keep("a fit", 1, until(1, true));
        keep("after the fit", 64, until(1, false));
        keep("codes", 64, at(1700, 50));
        keep("another fit", 1, until(2, true));
        keep("after another fit", 2, until(2, false));
        out
    })
}

fn odd() -> impl Strategy<Value = i32> {
    let near = [0, 1, 63, 64, 1 << 30, CELLS as i32, i32::MAX, i32::MIN];
    prop_oneof![any::<i32>(), -3..70i32, (0..near.len(), -2..3i32).prop_map(move |(i, by)| near[i].wrapping_add(by))]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_plans(scene in any::<prop::sample::Index>(), ints in prop::collection::vec((any::<prop::sample::Index>(), any::<bool>(), odd()), 1..5)) {
        let scene = scene.get(scenes());
        let mut plan = scene.stream.plan.clone();
        for (at, in_header, x) in &ints {
            // Each part of a plan gets its share: the header, and what follows it.
            let at = if *in_header { 2 + at.index(15) } else { at.index(plan.len()) };
            plan[at] = if *in_header { plan[at].wrapping_add(*x % 5) } else { *x };
        }
        scene.stream.all_calls(&scene.stream.arena, &plan, scene.n, &format!("{}: {ints:?}", scene.name));
    }

    #[test]
    fn damaged_arenas(scene in any::<prop::sample::Index>(), bytes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..200)) {
        let scene = scene.get(scenes());
        let mut arena = scene.stream.arena.clone();
        let end = arena.len() * 64;
        for (i, (at, x)) in bytes.iter().enumerate() {
            // Records and bases are at the beginning.
            let at = at.index(if i % 2 == 0 { end.min(40_000) } else { end });
            arena[at / 64].0[at % 64 / 8] ^= u64::from(*x) << (8 * (at % 8));
        }
        scene.stream.all_calls(&arena, &scene.stream.plan, scene.n, &format!("{}: {bytes:?}", scene.name));
    }
}

/// Valid plans are what the damaged ones are made of: all calls accept them.
#[test]
fn plans_that_are_whole() {
    for scene in scenes() {
        let s = &scene.stream;
        println!("{}: {} ints for {} tokens after {} rows", scene.name, s.plan.len(), scene.n, s.next);
        s.all_calls(&s.arena, &s.plan, scene.n, scene.name);
    }
    let flags: Vec<i32> = scenes().iter().map(|s| s.stream.plan[3]).collect();
    assert!(flags.iter().any(|f| f & 8 != 0), "a scene has former bases: {flags:?}");
    assert_eq!(flags.iter().filter(|f| *f & 1 != 0).count(), 2, "two scenes fit: {flags:?}");
}

/// States of some streams, and their cells.
fn states() -> &'static [(Vec<u8>, Vec<u32>)] {
    static STATES: OnceLock<Vec<(Vec<u8>, Vec<u32>)>> = OnceLock::new();
    STATES.get_or_init(|| {
        let mut out = Vec::new();
        let mut s = Stream::new();
        for rows in [0, 1, 200, 700] {
            while s.next < rows {
                s.append(50.min(rows - s.next));
            }
            out.push(s.save());
        }
        while fits(&s) < 2 {
            s.append(1);
        }
        out.push(s.save());
        out
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// The checksum is made right again, so that what is damaged is looked at; what is accepted can be worked with.
    #[test]
    fn damaged_states(
        which in any::<prop::sample::Index>(),
        bytes in prop::collection::vec((any::<prop::sample::Index>(), 0..4u8, any::<u8>()), 1..8),
        before in any::<bool>(),
    ) {
        let (state, cells) = which.get(states());
        let (mut state, body) = (state.clone(), state.len() - 4);
        for (at, place, x) in &bytes {
            // Header and cells, the flags behind the cells and the first bases, all of it, the end.
            let range = [0..24 + cells.len() * 5, 24 + cells.len() * 5..2000 + cells.len() * 5, 0..body, body - 400..body][usize::from(*place)].clone();
            state[(range.start + at.index(range.len())).min(body - 1)] = *x;
        }
        let crc = crc32fast::hash(&state[..body]).to_le_bytes();
        state[body..].copy_from_slice(&crc);
        let mut s = Stream::new();
        if before {
            s.append(10);
        }
        let status = s.restore(&state, cells);
        orderly(status, &format!("read, {bytes:?}"));
        if status == SKV_STATUS_OK {
            let what = format!("what was read, {bytes:?}");
            for n in [1, 50] {
                let status = s.plan(n);
                orderly(status, &what);
                if status == SKV_STATUS_OK {
                    s.all_calls(&s.arena, &s.plan, n, &what);
                }
            }
        }
    }
}
