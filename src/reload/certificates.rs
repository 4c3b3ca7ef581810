//! The pair of files behind `listen.tls`: read at the start, at every reload, and when one of them
//! changes. A pair that cannot be used leaves the one before in force.

use crate::config::catalog::TlsFiles;
use crate::gateway::{Certificate, Tls};

use super::watch::{Identity, identity};

#[derive(Debug)]
pub struct Certificates {
    tls: Tls,
    from: Option<Source>,
}

#[derive(Debug)]
struct Source {
    files: TlsFiles,
    /// As they were when they were last looked at.
    seen: [Option<Identity>; 2],
}

impl Source {
    fn of(files: &TlsFiles) -> Source {
        Source { seen: seen(files), files: files.clone() }
    }
}

/// What a reload is going to change.
#[derive(Debug)]
pub struct Prepared {
    from: Option<Source>,
    /// `None`: what is in force stays.
    change: Option<Option<Certificate>>,
    /// What is to be told of the files.
    pub warning: Option<String>,
}

impl Certificates {
    /// # Errors
    /// Names the file and what is wrong with it.
    pub fn load(files: Option<&TlsFiles>) -> Result<Certificates, String> {
        let mut certificates = Certificates { tls: Tls::default(), from: None };
        let prepared = certificates.prepare(files)?;
        if let Some(warning) = &prepared.warning {
            tracing::warn!("{warning}");
        }
        certificates.follow(prepared);
        Ok(certificates)
    }

    pub fn tls(&self) -> Tls {
        self.tls.clone()
    }

    /// Reads the files; changes nothing yet.
    ///
    /// # Errors
    /// Other files than those in force cannot be used. The same ones that are bad now are only
    /// warned of: whoever changes a model's ttl must not fail because a certificate is being renewed.
    pub fn prepare(&self, files: Option<&TlsFiles>) -> Result<Prepared, String> {
        let Some(files) = files else {
            return Ok(Prepared { from: None, change: Some(None), warning: None });
        };
        // Looked at first: what changes while it is read is read again.
        let from = Some(Source::of(files));
        match Certificate::load(files) {
            Ok(certificate) => {
                let warning = certificate.warning.clone();
                Ok(Prepared { from, change: Some(Some(certificate)), warning })
            }
            Err(why) if self.from.as_ref().is_some_and(|from| from.files == *files) => {
                let warning = Some(format!("{why}; the certificate before stays in force"));
                Ok(Prepared { from, change: None, warning })
            }
            Err(why) => Err(why),
        }
    }

    /// New connections get what was prepared; those that are there keep what they have.
    pub fn follow(&mut self, prepared: Prepared) {
        self.from = prepared.from;
        if let Some(certificate) = prepared.change {
            self.tls.set(certificate);
        }
    }

    /// Reads the files again if one of them is another one by now. They are looked at by name, as
    /// certbot and Kubernetes change a link, somewhere on the way to the file.
    pub fn look(&mut self) {
        let Some(from) = &self.from else { return };
        if seen(&from.files) == from.seen {
            return;
        }
        let files = from.files.clone();
        let prepared = match self.prepare(Some(&files)) {
            Ok(prepared) => prepared,
            Err(why) => return tracing::error!("{why}"),
        };
        let shown = files.cert_file.display();
        match (&prepared.change, &prepared.warning) {
            (None, why) => tracing::error!("{}", why.as_deref().unwrap_or_default()),
            (Some(_), Some(warning)) => tracing::warn!("{shown} was read again: {warning}"),
            (Some(_), None) => tracing::info!("{shown} was read again: new connections get it"),
        }
        self.follow(prepared);
    }
}

fn seen(files: &TlsFiles) -> [Option<Identity>; 2] {
    [identity(&files.cert_file), identity(&files.key_file)]
}
