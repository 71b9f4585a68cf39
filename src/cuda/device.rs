//! A CUDA device, and layers on it: the driver is loaded, the kernels are, constants are uploaded, and attention and storing are launched.
//!
//! Other libraries use the same device in the same process, ggml-cuda among them. So the context is the device's primary one, streams are borrowed, and a thread's current
//! context is afterwards what it was. cudarc's safe layer is left alone: it binds contexts for good, counts streams and may record events. A launch is nothing but
//! calls of the driver that launch, on the stream it is given: neither allocation nor synchronisation, so that it can be captured. Must not know what the kernels compute.

use super::launch::{self, Launch, StoreLaunch, STORE_THREADS, THREADS};
use super::layer::{SkvAttend, SkvLayer, SkvStore};
use crate::error::{Error, Result};
use crate::layout::Heads;
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;
use std::ffi::{c_void, CStr};
use std::fmt::Display;
use std::sync::Arc;

/// The kernels for all architectures, as build.rs has compiled them. The driver reads words of it.
#[repr(align(64))]
struct Image<T: ?Sized>(T);

static ATTEND: &Image<[u8]> = &Image(*include_bytes!(concat!(env!("OUT_DIR"), "/attend.fatbin")));
static STORE: &Image<[u8]> = &Image(*include_bytes!(concat!(env!("OUT_DIR"), "/store.fatbin")));

/// The oldest architecture that there are kernels for.
const LEAST_CAPABILITY: (i32, i32) = (8, 0);

/// What the driver says of a call that failed.
fn failure(what: impl Display) -> impl FnOnce(DriverError) -> Error {
    move |e| {
        let text = |text: std::result::Result<&CStr, DriverError>| text.map_or("unknown".into(), |t| t.to_string_lossy().into_owned());
        Error::Device(format!("cannot {what}: {} ({})", text(e.error_string()), text(e.error_name())))
    }
}

/// The primary context of a device, retained as long as this lives.
struct Context {
    device: sys::CUdevice,
    context: sys::CUcontext,
}

impl Context {
    fn retain(ordinal: u32) -> Result<Self> {
        // SAFETY: loads a library by name and asks it nothing.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::Device("there is no NVIDIA driver on this machine: its library (libcuda) cannot be loaded".into()));
        }
        result::init().map_err(failure("start the NVIDIA driver"))?;
        let device = i32::try_from(ordinal).unwrap_or(i32::MAX);
        let device = result::device::get(device).map_err(failure(format!("find device {ordinal}")))?;
        // SAFETY: the driver gave the device.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(failure(format!("use device {ordinal}")))?;
        Ok(Context { device, context })
    }

    /// Make it current on this thread, until what this gives is dropped.
    fn enter(&self) -> Result<Entered> {
        // SAFETY: the context is retained.
        unsafe { sys::cuCtxPushCurrent_v2(self.context) }.result().map_err(failure("enter the device's context"))?;
        Ok(Entered)
    }

    fn attribute(&self, attribute: sys::CUdevice_attribute) -> Result<i32> {
        // SAFETY: the driver gave the device.
        unsafe { result::device::get_attribute(self.device, attribute) }.map_err(failure("ask what the device can do"))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once, released once. At the end of a process the driver may be gone before; nobody is left who would mind.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

/// A context is current that was not before.
struct Entered;

impl Drop for Entered {
    fn drop(&mut self) {
        let mut left = std::ptr::null_mut();
        // SAFETY: what was pushed is on top: nothing in between leaves another.
        let _ = unsafe { sys::cuCtxPopCurrent_v2(&mut left) }.result();
    }
}

/// A device with the kernels on it.
pub struct Device {
    context: Context,
    /// Those that were loaded.
    modules: Vec<sys::CUmodule>,
    attend_8: sys::CUfunction,
    attend_16: sys::CUfunction,
    combine: sys::CUfunction,
    store: sys::CUfunction,
    multiprocessors: u32,
    /// Dynamic shared memory that a block of the attention kernels may have, and one of the kernel that stores.
    shared_bytes: usize,
    store_shared_bytes: usize,
}

// SAFETY: the driver's handles may be used by all threads; nothing here changes after creation.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

impl Device {
    /// Load the driver and the kernels onto a device.
    pub fn new(ordinal: u32) -> Result<Self> {
        use sys::CUdevice_attribute_enum::*;
        let context = Context::retain(ordinal)?;
        let major = context.attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = context.attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        if (major, minor) < LEAST_CAPABILITY {
            let (least, most) = LEAST_CAPABILITY;
            return Err(Error::Device(format!("device {ordinal} has compute capability {major}.{minor}; {least}.{most} is the least that will do")));
        }
        let multiprocessors = context.attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?.max(1) as u32;
        let most_shared = context.attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let none = std::ptr::null_mut();
        let [attend_8, attend_16, combine, store] = [none; 4];
        let mut device =
            Device { context, modules: vec![], attend_8, attend_16, combine, store, multiprocessors, shared_bytes: 0, store_shared_bytes: 0 };
        let _entered = device.context.enter()?;
        let what = format!("load the kernels on device {ordinal} (compute capability {major}.{minor})");
        let attend = device.load(ATTEND, &what)?;
        (device.attend_8, device.attend_16, device.combine) =
            (kernel(attend, c"skv_attend_8")?, kernel(attend, c"skv_attend_16")?, kernel(attend, c"skv_combine")?);
        device.store = kernel(device.load(STORE, &what)?, c"skv_store")?;
        device.shared_bytes = allow_shared(device.attend_8, most_shared)?.min(allow_shared(device.attend_16, most_shared)?);
        device.store_shared_bytes = allow_shared(device.store, most_shared)?;
        Ok(device)
    }

    /// Load a module, which goes when the device does.
    fn load(&mut self, image: &'static Image<[u8]>, what: &str) -> Result<sys::CUmodule> {
        // SAFETY: the image is a fatbin, aligned, and lives for ever.
        let module = unsafe { result::module::load_data(image.0.as_ptr().cast()) }.map_err(failure(what))?;
        self.modules.push(module);
        Ok(module)
    }
}

fn kernel(module: sys::CUmodule, name: &CStr) -> Result<sys::CUfunction> {
    // SAFETY: the module is loaded.
    unsafe { result::module::get_function(module, name.to_owned()) }.map_err(failure(format!("find the kernel {}", name.to_string_lossy())))
}

/// Let a kernel have all the shared memory that a block may: once for all layers, as launches must not change it. Gives how much of it is dynamic.
fn allow_shared(kernel: sys::CUfunction, most: i32) -> Result<usize> {
    use sys::CUfunction_attribute_enum::*;
    // SAFETY: the kernel is that of a loaded module.
    let fixed = unsafe { result::function::get_function_attribute(kernel, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES) };
    let dynamic = most - fixed.map_err(failure("ask for the shared memory of a kernel"))?;
    // SAFETY: the same.
    let set = unsafe { result::function::set_function_attribute(kernel, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, dynamic) };
    set.map_err(failure("give a kernel its shared memory"))?;
    Ok(usize::try_from(dynamic).unwrap_or(0))
}

impl Drop for Device {
    fn drop(&mut self) {
        if self.modules.is_empty() {
            return;
        }
        if let Ok(_entered) = self.context.enter() {
            for module in self.modules.drain(..) {
                // SAFETY: loaded once, unloaded once; the layers that launch its kernels keep the device.
                let _ = unsafe { result::module::unload(module) };
            }
        }
    }
}

/// A layer's constants in device memory.
pub struct DeviceLayer {
    device: Arc<Device>,
    heads: Heads,
    /// See [`launch::units`].
    units: usize,
    constants: sys::CUdeviceptr,
}

impl DeviceLayer {
    /// Upload what kernels know of a layer of these heads. Waits for the device.
    pub fn new(device: Arc<Device>, heads: Heads, constants: &SkvLayer) -> Result<Self> {
        let (need, allowed) = (launch::most_shared_bytes(&heads)?, device.shared_bytes);
        if need > allowed {
            let Heads { d_k, d_v, .. } = heads;
            let heads = format!("heads of {d_k} and {d_v} elements");
            return Err(Error::Device(format!("{heads} need {need} bytes of shared memory in a block, and the device allows {allowed}")));
        }
        let _entered = device.context.enter()?;
        // SAFETY: a context is current.
        let at = unsafe { result::malloc_sync(size_of::<SkvLayer>()) }.map_err(failure("allocate the constants of a layer"))?;
        let units = launch::units(constants.exact as usize, constants.tiles as usize);
        let layer = DeviceLayer { device: device.clone(), heads, units, constants: at };
        // SAFETY: as many bytes were allocated. The copy is over when the context has come to rest, whichever stream reads it.
        unsafe { result::memcpy_htod_sync(at, std::slice::from_ref(constants)) }.map_err(failure("upload the constants of a layer"))?;
        result::ctx::synchronize().map_err(failure("upload the constants of a layer"))?;
        Ok(layer)
    }

    /// How a call of so many query tokens is launched.
    pub fn launch(&self, n_tokens: usize) -> Result<Launch> {
        Launch::new(&self.heads, self.units, n_tokens, self.device.multiprocessors)
    }

    /// Bytes of the workspace of calls of up to so many query tokens.
    pub fn workspace_bytes(&self, n_tokens: usize) -> Result<usize> {
        launch::workspace_bytes(&self.heads, self.units, n_tokens, self.device.multiprocessors)
    }

    /// Launch the attention of a call; its layer and splits are filled in here. Returns before it is done.
    ///
    /// # Safety
    /// The call's addresses are of memory of this device that holds what the call says until the stream has come past it. `stream` is a stream of the
    /// device's primary context, or NULL.
    pub unsafe fn attend(&self, mut call: SkvAttend, stream: *mut c_void) -> Result<()> {
        let launch = self.launch(call.n_tokens as usize)?;
        (call.layer, call.splits) = (self.constants, launch.splits() as i32);
        let (device, [x, y, z]) = (&self.device, launch.grid);
        let attend = if launch.columns == 16 { device.attend_16 } else { device.attend_8 };
        let _entered = device.context.enter()?;
        // SAFETY: the caller's contract; the kernels take what `call` is, and shared memory was found to suffice when the layer was made.
        unsafe {
            start(attend, (x, y, z), (THREADS, launch.shared_bytes), stream, &mut call)?;
            start(device.combine, (launch.combine_blocks, 1, 1), (THREADS, 0), stream, &mut call)
        }
    }

    /// Launch the storing of a step; its layer is filled in here. Returns before it is done.
    ///
    /// # Safety
    /// As [`DeviceLayer::attend`]; nothing else uses the arena until the stream has come past it.
    pub unsafe fn store(&self, mut call: SkvStore, stream: *mut c_void) -> Result<()> {
        let launch = StoreLaunch::new(&self.heads)?;
        let (need, allowed) = (launch.shared_bytes, self.device.store_shared_bytes);
        if need > allowed {
            return Err(Error::Device(format!(
                "storing these heads needs {need} bytes of shared memory in a block, and the device allows {allowed}"
            )));
        }
        call.layer = self.constants;
        let _entered = self.device.context.enter()?;
        // SAFETY: the caller's contract; the kernel takes what `call` is.
        unsafe { start(self.device.store, (launch.blocks, 1, 1), (STORE_THREADS, launch.shared_bytes), stream, &mut call) }
    }
}

impl Drop for DeviceLayer {
    fn drop(&mut self) {
        if let Ok(_entered) = self.device.context.enter() {
            // SAFETY: allocated once, freed once; the driver waits for kernels that still read it.
            let _ = unsafe { result::free_sync(self.constants) };
        }
    }
}

/// Start a kernel that takes a call.
///
/// # Safety
/// The kernel does, all of it is true, and the context of kernel and stream is current.
unsafe fn start<T>(
    kernel: sys::CUfunction,
    grid: (u32, u32, u32),
    (threads, shared): (usize, usize),
    stream: *mut c_void,
    call: &mut T,
) -> Result<()> {
    let mut arguments = [(&raw mut *call).cast::<c_void>()];
    // SAFETY: the caller's contract; the driver copies the argument before it returns.
    let started = unsafe { result::launch_kernel(kernel, grid, (threads as u32, 1, 1), shared as u32, stream.cast(), &mut arguments) };
    started.map_err(failure("launch a kernel"))
}
