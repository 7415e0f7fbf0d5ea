//! Files that are either whole or not there.

use std::{
    fs,
    io::{ErrorKind, Write},
    path::Path,
};

use crate::{Error, Result};

/// Writes a file beside its place, flushes it to disk and renames it into place, making the folder if needed.
pub(crate) fn write(path: &Path, data: &[u8]) -> Result<()> {
    let at = |error| Error::io(path, error);
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(folder).map_err(at)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let beside = folder.join(format!(".{name}.partial"));
    let written = (|| {
        let mut file = fs::File::create(&beside)?;
        file.write_all(data)?;
        file.sync_all()?;
        fs::rename(&beside, path)
    })();
    written.map_err(|error| {
        let _ = fs::remove_file(&beside);
        at(error)
    })
}

/// Removes a file, if it is there.
pub(crate) fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io(path, error)),
        _ => Ok(()),
    }
}

/// Reads a text file.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|error| Error::io(path, error))
}
