//! Tells rustc where libtorch is, so that the crate's own programs find it at run time, and whether it has CUDA.

use std::{env, path::Path};

fn main() {
    println!("cargo:rustc-check-cfg=cfg(libtorch_cuda)");
    println!("cargo:rerun-if-env-changed=DEP_TCH_LIBTORCH_LIB");
    // Absent with `doc-only`, where there is nothing to link.
    let Ok(folder) = env::var("DEP_TCH_LIBTORCH_LIB") else {
        return;
    };
    println!("cargo:rustc-link-arg=-Wl,-rpath,{folder}");
    if Path::new(&folder).join("libtorch_cuda.so").exists() {
        println!("cargo:rustc-cfg=libtorch_cuda");
        println!("cargo:rustc-link-search=native={folder}");
        println!("cargo:rustc-link-lib=dylib=torch_cuda");
    }
}
