//! The one error type of the crate.

use std::{fmt, io, path::PathBuf};

use tch::TchError;

/// The result of every fallible call in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, and what was being done.
///
/// Opaque on purpose: look at [`Error::kind`] to tell cases apart. `Display` prints what was being done, outermost first,
/// then the problem with the path, field or tensor, what was found and what would be right.
#[derive(Debug)]
pub struct Error {
    kind: Box<ErrorKind>,
    context: Vec<String>,
}

/// The cases of [`Error`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A file or folder could not be read or written.
    #[error("{path}: {source}", path = .path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },
    /// A file was read, and what it holds is not what it should be.
    #[error("{path}: {message}", path = .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Which field, line or tensor is wrong, what was found and what is expected.
        message: String,
    },
    /// A setting has a value that is not allowed.
    #[error("{field} = {value}: must be {allowed}")]
    Setting {
        /// The setting's full name, as in the TOML file.
        field: String,
        /// The value found.
        value: String,
        /// What would be allowed.
        allowed: String,
    },
    /// A model folder asks for something that this crate does not implement.
    #[error("{path}: {key} = {value} is not supported: {supported}", path = .path.display())]
    Unsupported {
        /// The file that asks for it.
        path: PathBuf,
        /// The key in the file.
        key: String,
        /// Its value.
        value: String,
        /// What is supported.
        supported: String,
    },
    /// Two things that must fit together do not.
    #[error("{what}: expected {expected}, found {found}")]
    Mismatch {
        /// Which tensor, row or list.
        what: String,
        /// What would fit.
        expected: String,
        /// What was found.
        found: String,
    },
    /// A chat template does not take a conversation: it refuses it, or alters a message so that its place in the text
    /// cannot be told.
    #[error("{template}: {message}", template = .template.display())]
    Conversation {
        /// The template's file, or what it is in words.
        template: PathBuf,
        /// Why, in the template's own words where it refuses.
        message: String,
    },
    /// One example of a data set cannot be used.
    #[error("example {id}: {message}")]
    Example {
        /// The example's id.
        id: String,
        /// What is wrong with it.
        message: String,
    },
    /// The device that was asked for is not there.
    #[error("device {requested}: {reason}")]
    Device {
        /// The device as it was asked for.
        requested: String,
        /// Why it cannot be had.
        reason: String,
    },
    /// A number that must be finite is not.
    #[error("{what} is {value}, not a finite number")]
    NotFinite {
        /// What the number measures, and where.
        what: String,
        /// The value.
        value: f64,
    },
    /// libtorch refused an operation. The first line of its message; the rest is in the source.
    #[error("libtorch: {first_line}", first_line = first_line(.0))]
    Tensor(#[source] TchError),
}

fn first_line(error: &TchError) -> String {
    error.to_string().lines().next().unwrap_or_default().to_string()
}

impl Error {
    /// The case.
    pub fn kind(&self) -> &ErrorKind {
        &self.kind
    }

    /// Whether it is about what was asked, and not about the machine.
    pub(crate) fn is_of_conversation(&self) -> bool {
        matches!(&*self.kind, ErrorKind::Conversation { .. } | ErrorKind::Example { .. } | ErrorKind::Mismatch { .. })
    }

    /// Whether the device had no memory left for what libtorch was to do.
    pub(crate) fn is_out_of_memory(&self) -> bool {
        matches!(&*self.kind, ErrorKind::Tensor(error) if error.to_string().contains("out of memory"))
    }

    /// The same error, saying also what was being done: `doing` reads as in "while {doing}".
    #[must_use]
    pub fn while_doing(mut self, doing: impl Into<String>) -> Self {
        self.context.push(doing.into());
        self
    }

    /// The same error with another name for the setting that it is about.
    pub(crate) fn with_field(mut self, name: impl FnOnce(&str) -> String) -> Self {
        if let ErrorKind::Setting { field, .. } = &mut *self.kind {
            *field = name(field);
        }
        self
    }

    pub(crate) fn io(path: impl Into<PathBuf>, source: io::Error) -> Self {
        ErrorKind::Io { path: path.into(), source }.into()
    }

    pub(crate) fn file(path: impl Into<PathBuf>, message: impl Into<String>) -> Self {
        ErrorKind::File { path: path.into(), message: message.into() }.into()
    }

    /// For a plug-in's own settings: the error that every `validate` of this crate returns.
    pub fn setting(field: impl Into<String>, value: impl fmt::Display, allowed: impl Into<String>) -> Self {
        ErrorKind::Setting { field: field.into(), value: value.to_string(), allowed: allowed.into() }.into()
    }

    /// The same of a count that is 0.
    pub(crate) fn check_count(field: &str, count: usize) -> Result<()> {
        if count > 0 { Ok(()) } else { Err(Self::setting(field, count, "at least 1")) }
    }

    /// The same of a number that is not above 0, or infinite.
    pub(crate) fn check_positive(field: &str, value: f64) -> Result<()> {
        if value > 0.0 && value.is_finite() { Ok(()) } else { Err(Self::setting(field, value, "above 0 and finite")) }
    }

    /// The same of a number that is below 0, or infinite.
    pub(crate) fn check_not_negative(field: &str, value: f64) -> Result<()> {
        if value >= 0.0 && value.is_finite() {
            Ok(())
        } else {
            Err(Self::setting(field, value, "at least 0 and finite"))
        }
    }

    /// The same of a number that is not from 0 to below 1: a decay, or a share that may not be all.
    pub(crate) fn check_below_one(field: &str, value: f64) -> Result<()> {
        if (0.0..1.0).contains(&value) { Ok(()) } else { Err(Self::setting(field, value, "at least 0 and below 1")) }
    }

    /// The same of a share that is not between 0 and 1.
    pub(crate) fn check_share(field: &str, share: f64) -> Result<()> {
        if (0.0..=1.0).contains(&share) { Ok(()) } else { Err(Self::setting(field, share, "between 0 and 1")) }
    }

    /// For a plug-in's own checks: `what` should have been `expected` and was `found`.
    pub fn mismatch(what: impl Into<String>, expected: impl fmt::Display, found: impl fmt::Display) -> Self {
        ErrorKind::Mismatch { what: what.into(), expected: expected.to_string(), found: found.to_string() }.into()
    }

    /// For a plug-in's own checks: the example `id` cannot be used.
    pub fn example(id: impl Into<String>, message: impl Into<String>) -> Self {
        ErrorKind::Example { id: id.into(), message: message.into() }.into()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for doing in self.context.iter().rev() {
            write!(f, "while {doing}: ")?;
        }
        self.kind.fmt(f)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.kind.source()
    }
}

impl From<ErrorKind> for Error {
    fn from(kind: ErrorKind) -> Self {
        Self { kind: Box::new(kind), context: Vec::new() }
    }
}

impl From<TchError> for Error {
    fn from(error: TchError) -> Self {
        ErrorKind::Tensor(error).into()
    }
}

/// Adds to an error what was being done.
pub(crate) trait Context<T> {
    /// "while {doing}", evaluated only in the error case.
    fn context<S: Into<String>>(self, doing: impl FnOnce() -> S) -> Result<T>;
}

impl<T, E: Into<Error>> Context<T> for Result<T, E> {
    fn context<S: Into<String>>(self, doing: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|error| error.into().while_doing(doing()))
    }
}
