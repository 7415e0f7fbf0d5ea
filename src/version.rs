//! What computes: runs and evaluations are told apart by it.

/// Of this crate.
pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Of the libtorch that it was built for, as far as the build could tell.
pub(crate) const LIBTORCH: &str = match option_env!("ADVTRAIN_LIBTORCH") {
    Some(version) => version,
    None => "unknown",
};
