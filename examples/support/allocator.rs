//! jemalloc in place of the system's allocator, for what libtorch allocates too. Rows of ever other lengths leave gaps of ever other
//! sizes, among which glibc's allocator searches longer with each update (docs/performance.md).

#[cfg(target_os = "linux")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Huge pages, and nothing given back to the kernel, which takes a quarter of the time otherwise. `MALLOC_CONF` in the environment
/// overrides it.
#[cfg(target_os = "linux")]
#[used]
#[allow(non_upper_case_globals, reason = "jemalloc's name")]
// SAFETY: jemalloc declares this name for programs to define, as a pointer to a text that ends in a zero.
#[unsafe(export_name = "malloc_conf")]
static malloc_conf: &[u8; 50] = b"thp:always,dirty_decay_ms:-1,oversize_threshold:0\0";
