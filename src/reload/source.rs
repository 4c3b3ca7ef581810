//! File, overlay, environment and flags → one configuration.

use std::path::PathBuf;
use std::sync::Arc;

use serde::Serialize;

use super::Rejected;
use crate::config::catalog::Catalog;
use crate::config::{self, ConfigErrors, Loaded, Overlay};

/// A flag that outranks everything.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Flag {
    /// `--gateway (WHARF_GATEWAY)`
    pub flag: &'static str,
    /// The key that it stands for.
    pub key: &'static str,
}

type Flags = dyn Fn(&mut Catalog) -> anyhow::Result<Vec<Flag>> + Send + Sync;

#[derive(Clone)]
pub struct Source {
    pub path: PathBuf,
    /// Applies the flags, and says which were given.
    pub flags: Arc<Flags>,
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Source({})", self.path.display())
    }
}

/// A configuration that can be used, and the text it was made from.
#[derive(Clone, Debug)]
pub struct Built {
    pub text: String,
    pub overlay: Overlay,
    pub loaded: Loaded,
    pub flags: Vec<Flag>,
}

/// What becomes of an overlay that does not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Misfits {
    /// Stored things must not keep Wharf from starting.
    LeaveOut,
    /// Who asks for something new is told.
    Refuse,
}

impl Source {
    /// # Errors
    /// The file cannot be read.
    pub fn read(&self) -> Result<String, ConfigErrors> {
        config::read_file(&self.path)
    }

    /// # Errors
    /// What is wrong with the file, or with flags (a key file).
    pub fn build(
        &self,
        text: String,
        overlay: Overlay,
        misfits: Misfits,
    ) -> Result<Built, Rejected> {
        let file = self.path.display().to_string();
        let mut loaded = match misfits {
            Misfits::LeaveOut => config::parse_around(&text, &file, &overlay, &config::own_env)?,
            Misfits::Refuse => config::parse_over(&text, &file, &overlay, &config::own_env)?,
        };
        let flags = (self.flags)(&mut loaded.catalog)
            .map_err(|error| Rejected::Unfit(format!("{error:#}")))?;
        Ok(Built { text, overlay, loaded, flags })
    }
}
