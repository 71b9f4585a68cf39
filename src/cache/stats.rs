//! What a layer has done, counted. Must not know what the numbers are for.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Counters of one layer, updated by whichever thread does the work.
        #[derive(Debug, Default)]
        pub struct Counters { $($(#[$doc])* pub $name: AtomicU64,)* }
        /// A reading of [`Counters`].
        #[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
        pub struct Stats { $($(#[$doc])* pub $name: u64,)* }
        impl Counters {
            /// Read all.
            pub fn read(&self) -> Stats {
                Stats { $($name: self.$name.load(Relaxed),)* }
            }
        }
    };
}

counters! {
    /// Rows stored by steps of more than 64 tokens.
    appended_prefill,
    /// Rows stored by steps of up to 64 tokens.
    appended_decode,
    /// Rows coded by steps of more than 64 tokens.
    sealed_prefill,
    /// Rows coded by steps of up to 64 tokens.
    sealed_decode,
    /// Visible exact rows, summed over the query tokens of steps of up to 64 that attended to them.
    attended_exact,
    /// Visible coded rows, summed over the query tokens of steps of up to 64 that attended to them.
    attended_coded,
    /// Coded rows rebuilt: each once for a step of more than 64 tokens, or on request.
    reconstructed,
    /// Times the bases were fitted.
    fits,
    /// Coded rows moved by compaction.
    moved,
    /// Rows coded again in a coarser band.
    recoded,
    /// Nanoseconds of the first thread in storing.
    ns_encode,
    /// Nanoseconds of the first thread in attention.
    ns_attend,
    /// Nanoseconds of the first thread in rebuilding.
    ns_reconstruct,
}
