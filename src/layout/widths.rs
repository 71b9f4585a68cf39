//! Bit widths of a tile's coefficients: how many have each, where each lies, and how code for one width is chosen.
//!
//! Must not know what a code stands for.

use super::quant::coefficient_bytes;

/// How many coefficients of a tile have each width, widest first, in the order in which they are stored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Widths {
    /// Coefficients of 8, 6, 5, 4, 3, 2 and 1 bits.
    pub counts: [usize; Widths::BITS.len()],
}

/// Neighbouring coefficients of one width.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Their width.
    pub bits: u32,
    /// The number of the first.
    pub first: usize,
    /// How many there are.
    pub n: usize,
    /// The first byte of the first.
    pub at: usize,
}

impl Run {
    /// Where its codes lie.
    #[inline(always)]
    pub fn bytes(&self) -> std::ops::Range<usize> {
        self.at..self.at + self.n * coefficient_bytes(self.bits)
    }
    /// The numbers of its coefficients.
    #[inline(always)]
    pub fn range(&self) -> std::ops::Range<usize> {
        self.first..self.first + self.n
    }
}

impl Widths {
    /// The widths that are stored, in their order.
    pub const BITS: [u32; 7] = [8, 6, 5, 4, 3, 2, 1];
    /// How many of these are *wide*: too many bits for levels of a byte.
    const WIDE: usize = 2;

    /// `n` coefficients of `bits` each.
    pub fn equal(n: usize, bits: u32) -> Self {
        Widths { counts: Self::BITS.map(|b| if b == bits { n } else { 0 }) }
    }

    /// Those of `cut` bits and more, and the others: what is wide comes first.
    pub fn parts(&self, cut: u32) -> [Widths; 2] {
        let part = |wide: bool| Widths { counts: std::array::from_fn(|i| if (Self::BITS[i] >= cut) == wide { self.counts[i] } else { 0 }) };
        [part(true), part(false)]
    }
    /// Coefficients in all.
    pub fn rank(&self) -> usize {
        self.counts.iter().sum()
    }
    /// Bytes of one tile's codes.
    pub fn bytes(&self) -> usize {
        self.counts.iter().zip(Self::BITS).map(|(n, bits)| n * coefficient_bytes(bits)).sum()
    }
    /// Width and byte offset of coefficient `j`.
    #[inline(always)]
    pub fn place(&self, j: usize) -> (u32, usize) {
        let (mut j, mut at) = (j, 0);
        for (n, bits) in self.counts.into_iter().zip(Self::BITS) {
            if j < n {
                return (bits, at + j * coefficient_bytes(bits));
            }
            j -= n;
            at += n * coefficient_bytes(bits);
        }
        (0, at)
    }
    /// The coefficients of each width, those of none included.
    #[inline(always)]
    pub fn runs(&self) -> impl Iterator<Item = Run> {
        let (mut first, mut at) = (0, 0);
        self.counts.into_iter().zip(Self::BITS).map(move |(n, bits)| {
            let run = Run { bits, first, n, at };
            first += n;
            at = run.bytes().end;
            run
        })
    }
    /// Those of 5 bits and less, whose levels are whole numbers of a byte.
    #[inline(always)]
    pub fn narrow_runs(&self) -> impl Iterator<Item = Run> {
        self.runs().skip(Self::WIDE)
    }
    /// The first coefficient of [`Widths::narrow_runs`].
    #[inline(always)]
    pub fn narrow_from(&self) -> usize {
        self.counts[..Self::WIDE].iter().sum()
    }
}

/// `$body` with `$width` a constant: the number of bits, any that is stored, or with `narrow` in front one of 5 and less.
macro_rules! with_width {
    (narrow $bits:expr, $width:ident => $body:expr) => {
        with_width!(@ $bits, $width => $body; 5 4 3 2)
    };
    ($bits:expr, $width:ident => $body:expr) => {
        with_width!(@ $bits, $width => $body; 8 6 5 4 3 2)
    };
    (@ $bits:expr, $width:ident => $body:expr; $($some:literal)*) => {
        match $bits {
            $($some => {
                const $width: u32 = $some;
                $body
            })*
            _ => {
                const $width: u32 = 1;
                $body
            }
        }
    };
}
pub(crate) use with_width;
