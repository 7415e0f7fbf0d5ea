//! Keeps `libtorch_cuda` linked into every program that uses this crate.
//!
//! The linker drops a shared library from which nothing is used. libtorch's CUDA library registers its kernels when it
//! is loaded and no Rust code calls it by name, so without this static a CUDA machine would look like one without.

unsafe extern "C" {
    #[link_name = "_ZN2at4cuda9warp_sizeEv"]
    fn warp_size() -> i32;
}

// SAFETY: the function is never called; its address alone makes the linker keep the library.
#[used]
static KEEP_LIBTORCH_CUDA: unsafe extern "C" fn() -> i32 = warp_size;
