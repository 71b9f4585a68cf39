//! A small generator of random numbers (SplitMix64, Steele et al. 2014).
//!
//! Owned here because results must not change with the version of a crate: the seed is part of what
//! an evaluation or a log is. Must not know what is drawn.

const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// The number that a generator in state `x` gives next.
pub fn mix(x: u64) -> u64 {
    let z = x.wrapping_add(STEP);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The state of a generator.
pub struct Random(u64);

impl Random {
    /// A generator of its own for each pair of a seed and a stream.
    pub fn new(seed: u64, stream: u64) -> Self {
        let mut mixed = Self(seed ^ stream.wrapping_mul(0xd134_2543_de82_ef95));
        mixed.next();
        mixed
    }

    fn next(&mut self) -> u64 {
        let mixed = mix(self.0);
        self.0 = self.0.wrapping_add(STEP);
        mixed
    }

    /// Uniform in `0..1`.
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in `0..n`; 0 for `n` of 0.
    pub fn below(&mut self, n: usize) -> usize {
        (self.unit() * n as f64) as usize
    }

    /// The numbers `0..n` in random order.
    pub fn order(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            order.swap(i, self.below(i + 1));
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_numbers_of_splitmix64() {
        let mut r = Random(1234567);
        assert_eq!([r.next(), r.next(), r.next()], [6457827717110365317, 3203168211198807973, 9817491932198370423]);
    }

    #[test]
    fn an_order_has_each_number_once() {
        let mut order = Random::new(1, 2).order(50);
        assert_ne!(order, (0..50).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..50).collect::<Vec<_>>());
    }
}
