//! Memory that kernels work in, and asking for memory that they will read.
//!
//! Must not know what is in it.

/// Memory in whole cache lines, so that wide loads never straddle two. Keeps its size when asked for less.
#[derive(Debug, Default)]
pub struct Lines(Vec<Line>);

#[derive(Debug, Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
struct Line([f32; 16]);

impl Lines {
    /// At least `bytes` bytes; what is new is zero.
    pub fn resize(&mut self, bytes: usize) {
        let lines = bytes.div_ceil(64);
        if lines > self.0.len() {
            self.0.resize(lines, Line([0.0; 16]));
        }
    }
    /// As floats.
    pub fn floats(&self) -> &[f32] {
        bytemuck::cast_slice(&self.0)
    }
    /// As mutable floats.
    pub fn floats_mut(&mut self) -> &mut [f32] {
        bytemuck::cast_slice_mut(&mut self.0)
    }
    /// As bytes.
    pub fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
    /// As mutable bytes.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(&mut self.0)
    }
}

/// Memory that will be read soon, asked for a few cache lines at a time between other work: tiles are read in pieces too short for the hardware to
/// guess the next, and many requests at once wait for each other. Keeps addresses only, and never reads.
#[derive(Debug, Default)]
pub struct Ahead {
    at: usize,
    /// Where the present piece ends, and how many there are behind it.
    end: usize,
    pieces: usize,
    piece: usize,
    stride: usize,
}

impl Ahead {
    /// `n` pieces of `piece` bytes in some memory, `stride` apart, as far as they lie in it.
    pub fn pieces(memory: &[u8], first: usize, piece: usize, stride: usize, n: usize) -> Self {
        let room = memory.len().saturating_sub(first + piece);
        let n = if first + piece > memory.len() { 0 } else { n.min(1 + room.checked_div(stride).unwrap_or(0)) };
        let at = memory.as_ptr().addr() + first;
        Ahead { at, end: if n > 0 { at + piece } else { at }, pieces: n.saturating_sub(1), piece, stride }
    }
    /// Ask for the next lines, as far as there are any, to come to the second cache.
    #[inline(always)]
    pub fn fetch(&mut self, lines: usize) {
        for _ in 0..lines {
            if self.at >= self.end {
                if self.pieces == 0 {
                    return;
                }
                let first = self.end - self.piece + self.stride;
                (self.at, self.end, self.pieces) = (first, first + self.piece, self.pieces - 1);
            }
            ask_for_line(self.at);
            self.at += LINE;
        }
    }
}

const LINE: usize = 64;

/// Ask for some memory to come to the second cache.
#[inline(always)]
pub fn ask_for<T>(memory: &[T]) {
    let at = memory.as_ptr().addr();
    (at..at + size_of_val(memory)).step_by(LINE).for_each(ask_for_line);
}

#[inline(always)]
fn ask_for_line(at: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch reads nothing, whatever the address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(std::ptr::without_provenance(at));
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above; its intrinsic is not stable.
    unsafe {
        std::arch::asm!("prfm pldl2keep, [{0}]", in(reg) at, options(nomem, nostack, preserves_flags));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = at;
}
