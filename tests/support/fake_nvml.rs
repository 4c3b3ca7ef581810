//! A libnvidia-ml built from `fake_nvml.c`, with a state file of its own. Other programs load it
//! by `WHARF_NVML_LIBRARY`; what the state may say stands at the top of the C file.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

pub struct FakeNvml {
    folder: tempfile::TempDir,
}

impl FakeNvml {
    /// `None`, said loudly, where there is no C compiler.
    pub fn build(state: &str) -> Option<FakeNvml> {
        static BUILT: OnceLock<Option<PathBuf>> = OnceLock::new();
        let built = BUILT.get_or_init(compile).as_ref()?;
        // A copy for each test: the loader takes it for another library, with its own state.
        let folder = tempfile::tempdir().expect("a folder");
        let fake = FakeNvml { folder };
        std::fs::copy(built, fake.library()).expect("copied");
        fake.set(state);
        Some(fake)
    }

    pub fn library(&self) -> PathBuf {
        self.folder.path().join("libfake-nvml.so")
    }

    /// Replaces what the library says, at once for every program that loaded it.
    pub fn set(&self, state: &str) {
        let path = self.folder.path().join("libfake-nvml.so.state");
        let new = path.with_extension("new");
        std::fs::write(&new, state).expect("written");
        std::fs::rename(&new, &path).expect("renamed");
    }
}

fn compile() -> Option<PathBuf> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/fake_nvml.c");
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    // Test binaries may run side by side: each builds its own.
    let library = folder.join(format!("libfake-nvml-{}.so", std::process::id()));
    let cc = Command::new("cc")
        .args(["-shared", "-fPIC", "-O1", "-o"])
        .args([&library, &source])
        .status();
    match cc {
        Ok(status) => {
            assert!(status.success(), "cc failed on {}", source.display());
            Some(library)
        }
        Err(error) => {
            eprintln!("SKIPPED: no C compiler for the fake NVML (cc: {error}); install gcc");
            None
        }
    }
}
