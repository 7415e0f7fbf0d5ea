//! Tells rustc where libtorch is, so that programs find it at run time, whether it has CUDA, and which version it is.

use std::{
    env,
    path::{Path, PathBuf},
};

fn main() {
    println!("cargo:rustc-check-cfg=cfg(libtorch_cuda)");
    println!("cargo:rerun-if-env-changed=DEP_TCH_LIBTORCH_LIB");
    // Absent with `doc-only`, where there is nothing to link.
    let Ok(folder) = env::var("DEP_TCH_LIBTORCH_LIB") else {
        return;
    };
    println!("cargo:rustc-link-arg=-Wl,-rpath,{folder}");
    let_cargo_run_find(Path::new(&folder));
    if let Some((file, version)) = version(Path::new(&folder)) {
        println!("cargo:rustc-env=ADVTRAIN_LIBTORCH={version}");
        // Another libtorch in the same place is another version, or the same with or without CUDA.
        println!("cargo:rerun-if-changed={}", file.display());
    }
    if Path::new(&folder).join("libtorch_cuda.so").exists() {
        println!("cargo:rustc-cfg=libtorch_cuda");
        println!("cargo:rustc-link-search=native={folder}");
        println!("cargo:rustc-link-lib=dylib=torch_cuda");
    }
}

/// The rpath reaches this package's own binaries, examples and tests alone. What `cargo run` and `cargo test` start in packages
/// that depend on it finds libraries in the search folders that lie inside the target folder: Cargo puts those, and no
/// others, into the library path. A link there is enough; a program started without Cargo needs a path of its own.
fn let_cargo_run_find(libraries: &Path) {
    let Some(out) = env::var_os("OUT_DIR") else { return };
    let link = Path::new(&out).join("libtorch");
    let _ = std::fs::remove_file(&link);
    #[cfg(unix)]
    match std::os::unix::fs::symlink(libraries, &link) {
        Ok(()) => println!("cargo:rustc-link-search=native={}", link.display()),
        Err(error) => println!(
            "cargo:warning={}: {error}; `cargo run` of packages that depend on this one will not find libtorch",
            link.display()
        ),
    }
    #[cfg(not(unix))]
    let _ = libraries;
}

/// What PyTorch's package (`version.py`) or libtorch's archive (`build-version`) says beside the folder of libraries.
fn version(libraries: &Path) -> Option<(PathBuf, String)> {
    let folder = libraries.parent()?;
    let (archive, package) = (folder.join("build-version"), folder.join("version.py"));
    if let Ok(version) = std::fs::read_to_string(&archive) {
        return Some((archive, version.trim().to_string()));
    }
    let text = std::fs::read_to_string(&package).ok()?;
    let version = text.lines().find_map(|line| line.strip_prefix("__version__ = "))?;
    Some((package, version.trim_matches(['\'', '"']).to_string()))
}
