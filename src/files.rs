//! Files that are either whole or not there.

use std::{
    fmt, fs,
    io::{ErrorKind, Write},
    path::Path,
};

use serde::{Serialize, de::DeserializeOwned};

use crate::{Error, Result};

/// Writes a file beside its place, flushes it to disk and renames it into place, making the folder if needed.
pub(crate) fn write(path: &Path, data: &[u8]) -> Result<()> {
    let at = |error| Error::io(path, error);
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(folder).map_err(at)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // Two processes may write the same file at once.
    let beside = folder.join(format!(".{name}.{}.partial", std::process::id()));
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

/// The lock of a folder, which is made if it is not there. It is free again once the file is closed.
pub(crate) fn lock(folder: &Path) -> Result<fs::File> {
    fs::create_dir_all(folder).map_err(|error| Error::io(folder, error))?;
    let path = folder.join("lock");
    let at = |error| Error::io(&path, error);
    let file = fs::OpenOptions::new().create(true).truncate(false).write(true).open(&path).map_err(at)?;
    match fs4::FileExt::try_lock(&file) {
        Ok(()) => Ok(file),
        Err(fs4::TryLockError::WouldBlock) => {
            Err(Error::file(folder, "another process is at work in this folder; wait for it, or choose another folder"))
        }
        Err(fs4::TryLockError::Error(error)) => Err(at(error)),
    }
}

/// Removes a file, if it is there.
pub(crate) fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io(path, error)),
        _ => Ok(()),
    }
}

/// Writes a value as indented JSON, as [`write`] does.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let json = serde_json::to_vec_pretty(value).map_err(|error| Error::file(path, error.to_string()))?;
    write(path, &json)
}

/// Reads a JSON file.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    serde_json::from_str(&read_text(path)?).map_err(|error| {
        // The rest is JSON that says something else than it should.
        let what = if error.is_data() { "" } else { "not JSON: " };
        Error::file(path, format!("{what}{error}"))
    })
}

/// Reads a value from the TOML text of a file: errors name the field.
pub(crate) fn parse_toml<T: DeserializeOwned>(text: &str, path: &Path) -> Result<T> {
    let wrong = |error: &dyn fmt::Display| Error::file(path, error.to_string().trim_end().to_string());
    let document = toml::Deserializer::parse(text).map_err(|error| wrong(&error))?;
    serde_path_to_error::deserialize(document)
        .map_err(|error| wrong(&format!("{}: {}", error.path(), error.inner().message())))
}

/// Reads a text file.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|error| Error::io(path, error))
}
