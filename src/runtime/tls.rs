//! TLS to engines elsewhere: whom to trust, and what to say of a certificate that is not good.

use std::error::Error as StdError;
use std::io;
use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use rustls::{CertificateError, ClientConfig, RootCertStore};

/// How an endpoint's certificate is judged. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Tls(Arc<ClientConfig>);

impl Tls {
    /// Trusts the authorities in the PEM file `ca` and no others; without one, those of this
    /// machine. Reads files. The error names the file and the fix.
    pub fn new(ca: Option<&Path>) -> Result<Tls, String> {
        let roots = match ca {
            Some(path) => private_roots(path)?,
            None => machine_roots()?,
        };
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| format!("TLS cannot be set up: {error}"))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Tls(Arc::new(config)))
    }

    pub fn of(config: ClientConfig) -> Tls {
        Tls(Arc::new(config))
    }

    pub fn config(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.0)
    }
}

/// The same set-up, not merely an equal one.
impl PartialEq for Tls {
    fn eq(&self, other: &Tls) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Tls {}

fn private_roots(path: &Path) -> Result<RootCertStore, String> {
    let bad = |why: &dyn std::fmt::Display| {
        format!("external.ca {}: {why}; it must hold certificates in PEM", path.display())
    };
    let pem = std::fs::read(path).map_err(|error| bad(&error))?;
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate = certificate.map_err(|error| bad(&error))?;
        roots.add(certificate).map_err(|error| bad(&error))?;
    }
    if roots.is_empty() { Err(bad(&"holds no certificate")) } else { Ok(roots) }
}

fn machine_roots() -> Result<RootCertStore, String> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    // One that cannot be read must not spoil the others.
    roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        let why = found.errors.first().map_or(String::new(), |error| format!(" ({error})"));
        return Err(format!(
            "this machine has no certificates of authorities{why}: install ca-certificates, or give \
             the server's as external.ca"
        ));
    }
    Ok(roots)
}

/// What is wrong with the other side's TLS, if that is what failed; another attempt would fail
/// alike. `authority`: `gpu2.lan:8000`.
pub fn trouble(error: &(dyn StdError + 'static), authority: &str) -> Option<String> {
    use CertificateError as Bad;
    Some(match tls_error(error)? {
        rustls::Error::InvalidCertificate(bad) => {
            let certificate = format!("the certificate of {authority}");
            match bad {
                Bad::UnknownIssuer => format!(
                    "{certificate} is not trusted: nobody that is trusted here issued it; give \
                     its CA as external.ca"
                ),
                Bad::Expired | Bad::ExpiredContext { .. } => {
                    format!(
                        "{certificate} has expired: renew it there, or set this machine's clock"
                    )
                }
                Bad::NotValidYet | Bad::NotValidYetContext { .. } => {
                    format!("{certificate} is not valid yet: set this machine's clock")
                }
                Bad::NotValidForName => format!(
                    "{certificate} is for another name: write the name that it is for in external.url"
                ),
                Bad::NotValidForNameContext { presented, .. } => format!(
                    "{certificate} is for another name ({}): write that in external.url",
                    presented.join(", ")
                ),
                // webpki's words for a self-signed certificate made by `openssl req -x509`.
                Bad::Other(other) if other.to_string().contains("CaUsedAsEndEntity") => format!(
                    "{certificate} is not trusted: it is an authority's own, not one for a server; \
                     issue one for the server with it"
                ),
                bad => format!("{certificate} is not trusted: {bad}"),
            }
        }
        rustls::Error::InvalidMessage(_) => {
            format!("{authority} does not speak TLS: is it http:// ?")
        }
        other => format!("TLS with {authority} failed: {other}"),
    })
}

/// `io::Error` passes over the error that it wraps when asked for its source.
pub fn tls_error<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a rustls::Error> {
    if let Some(found) = error.downcast_ref::<rustls::Error>() {
        return Some(found);
    }
    let wrapped = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
    match wrapped {
        Some(inner) => tls_error(inner),
        None => tls_error(error.source()?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cause_is_found_however_deep_and_named_with_its_fix() {
        let bad =
            |error| io::Error::other(io::Error::other(rustls::Error::InvalidCertificate(error)));
        let said = |error| trouble(&bad(error), "gpu2.lan:8000").unwrap();
        let unknown = said(CertificateError::UnknownIssuer);
        assert!(unknown.contains("certificate of gpu2.lan:8000 is not trusted"), "{unknown}");
        assert!(unknown.contains("external.ca"), "{unknown}");
        assert!(said(CertificateError::Expired).contains("has expired"));
        assert!(said(CertificateError::NotValidForName).contains("external.url"));
        assert!(trouble(&io::Error::from(io::ErrorKind::ConnectionReset), "a:1").is_none());
    }

    #[test]
    fn a_bad_ca_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca.pem");
        for text in [
            None,
            Some(""),
            Some("no PEM"),
            Some("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
        ] {
            if let Some(text) = text {
                std::fs::write(&path, text).unwrap();
            }
            let error = Tls::new(Some(&path)).unwrap_err();
            assert!(error.contains("ca.pem") && error.contains("PEM"), "{error}");
        }
    }
}
