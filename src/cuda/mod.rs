//! Decode attention, and storing, on CUDA devices: what the kernels in `kernels` are told, how they are launched, and the device they run on.
//!
//! [`layer`] and [`launch`] are arithmetic, the same in every build. [`Device`] and [`DeviceLayer`] speak to the driver; in a build without the feature
//! `cuda` they have the same names and refuse, so that nobody above has to know. What all of these need of a layer is handed in, as sizes, rotation and
//! scoring ([`crate::layout`], [`crate::rope`], [`crate::config`]): must not know cache, plans or C.

#[cfg(not(feature = "cuda"))]
#[deny(unsafe_code)]
mod absent;
#[cfg(feature = "cuda")]
mod device;
#[deny(unsafe_code)]
#[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "what only a device asks for is tested without one"))]
pub mod launch;
#[deny(unsafe_code)]
pub mod layer;

#[cfg(not(feature = "cuda"))]
pub use absent::{Device, DeviceLayer};
#[cfg(feature = "cuda")]
pub use device::{Device, DeviceLayer};
