//! The library's error type and the numbers it has in C. The one place where status numbers are assigned.

use thiserror::Error;

/// Result of a library call.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong, with a sentence for a person.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// An argument is out of range or contradicts another.
    #[error("invalid argument: {0}")]
    Argument(String),
    /// A configuration cannot be built.
    #[error("invalid configuration: {0}")]
    Config(String),
    /// A buffer is smaller than what has to go into it.
    #[error("buffer too small: {need} needed, {have} given")]
    Buffer {
        /// Elements or bytes needed.
        need: usize,
        /// Elements or bytes given.
        have: usize,
    },
    /// No room for more rows.
    #[error("the cache is full: {0}")]
    Full(String),
    /// The call does not fit the state of the object.
    #[error("wrong state: {0}")]
    State(String),
    /// A key, value or query is NaN or infinite, or beyond the range of f16.
    #[error("not finite: {0}")]
    NotFinite(String),
    /// An arena, plan or saved state is damaged, truncated or of another version.
    #[error("bad data: {0}")]
    Data(String),
    /// A matrix decomposition did not converge.
    #[error("numeric failure: {0}")]
    Numeric(String),
    /// A CUDA device, its driver or this build of the library lacks what a call needs.
    #[error("CUDA: {0}")]
    Device(String),
}

impl Error {
    /// The number of this error in the C API (`skv_status`).
    pub fn code(&self) -> i32 {
        match self {
            Error::Argument(_) => 101,
            Error::Config(_) => 102,
            Error::Buffer { .. } => 103,
            Error::Full(_) => 104,
            Error::State(_) => 105,
            Error::Data(_) => 201,
            Error::NotFinite(_) => 301,
            Error::Numeric(_) => 302,
            Error::Device(_) => 401,
        }
    }
}

/// Shorthand for an [`Error::Argument`].
pub(crate) fn argument<T>(message: impl Into<String>) -> Result<T> {
    Err(Error::Argument(message.into()))
}
