//! The rotation of a model's keys: from the words of the probe to those of the library.

use spectral_kv::rope::{Pairing, RopeParams};

use super::probe::RopeInfo;

/// The library's parameters.
pub fn params(r: &RopeInfo) -> RopeParams {
    RopeParams {
        pairing: if r.neox { Pairing::Halves } else { Pairing::Adjacent },
        n_dims: r.n_rot,
        offset: r.offset,
        n_ctx_orig: r.n_ctx_orig as u32,
        freq_base: r.freq_base,
        freq_scale: r.freq_scale,
        ext_factor: r.ext_factor,
        beta_fast: r.beta_fast,
        beta_slow: r.beta_slow,
        freq_factors: r.freq_factors.clone(),
    }
}
