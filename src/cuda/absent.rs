//! In the place of a device, in builds without the feature `cuda`: creating one fails, so that nothing else is ever called.
//!
//! Must have the names and parameters of `device.rs`.

use super::launch::Launch;
use super::layer::{SkvAttend, SkvLayer, SkvStore};
use crate::error::{Error, Result};
use crate::layout::Heads;
use std::ffi::c_void;
use std::sync::Arc;

/// A device that no build without CUDA has.
pub enum Device {}

impl Device {
    /// Refuses.
    pub fn new(_ordinal: u32) -> Result<Self> {
        Err(Error::Device("this library was built without CUDA; build it with `--features cuda`".into()))
    }
}

/// A layer on a device that there is not.
pub enum DeviceLayer {}

impl DeviceLayer {
    /// Never called.
    pub fn new(device: Arc<Device>, _heads: Heads, _constants: &SkvLayer) -> Result<Self> {
        match *device {}
    }

    /// Never called.
    pub fn launch(&self, _n_tokens: usize) -> Result<Launch> {
        match *self {}
    }

    /// Never called.
    pub fn workspace_bytes(&self, _n_tokens: usize) -> Result<usize> {
        match *self {}
    }

    /// Never called.
    ///
    /// # Safety
    /// None is needed.
    #[expect(unsafe_code, reason = "as the one that launches")]
    pub unsafe fn attend(&self, _call: SkvAttend, _stream: *mut c_void) -> Result<()> {
        match *self {}
    }

    /// Never called.
    ///
    /// # Safety
    /// None is needed.
    #[expect(unsafe_code, reason = "as the one that launches")]
    pub unsafe fn store(&self, _call: SkvStore, _stream: *mut c_void) -> Result<()> {
        match *self {}
    }
}
