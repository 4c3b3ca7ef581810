//! TLS on the listeners (`listen.tls`): what the two files must hold, and what happens to a
//! connection before it is served.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwapOption;
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, InconsistentKeys, RootCertStore, ServerConfig};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::config::catalog::TlsFiles;

/// From the connection to the end of the handshake.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);
/// The first byte of every TLS connection; no HTTP method begins with it.
const HANDSHAKE_RECORD: u8 = 22;
/// Whoever renews by a timer has done so long before.
const EXPIRES_SOON: Duration = Duration::from_secs(7 * 24 * 3600);

/// The certificate that new connections get, of all listeners alike; `None`: they are plain.
/// Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Tls(Arc<ArcSwapOption<ServerConfig>>);

impl Tls {
    /// Connections that are there already keep theirs.
    pub fn set(&self, certificate: Option<Certificate>) {
        self.0.store(certificate.map(|certificate| certificate.config));
    }

    pub fn config(&self) -> Option<Arc<ServerConfig>> {
        self.0.load_full()
    }
}

/// A pair of files that can be used.
#[derive(Clone, Debug)]
pub struct Certificate {
    config: Arc<ServerConfig>,
    /// It has expired, or soon will have.
    pub warning: Option<String>,
}

impl Certificate {
    /// # Errors
    /// Names the file and what is wrong with it.
    pub fn load(TlsFiles { cert_file, key_file }: &TlsFiles) -> Result<Certificate, String> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let chain = chain(cert_file)?;
        let key = private_key(key_file)?;
        let warning = expiry(&chain, &provider, SystemTime::now())
            .map(|when| format!("listen.tls.cert_file {}: {when}", cert_file.display()));
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| format!("listen.tls: TLS cannot be set up: {error}"))?
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .map_err(|error| mismatch(&error, cert_file, key_file))?;
        // HTTP/1.1 only, as without TLS: who offers HTTP/2 alone is told so in the handshake.
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Certificate { config: Arc::new(config), warning })
    }
}

fn read(key: &str, path: &Path) -> Result<Vec<u8>, String> {
    std::fs::read(path)
        .map_err(|error| format!("listen.tls.{key} {} cannot be read: {error}", path.display()))
}

fn chain(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let bad = |why: &str| {
        format!(
            "listen.tls.cert_file {} {why}; it must hold the server's certificate in PEM, and after \
             it those of its issuers",
            path.display()
        )
    };
    let pem = read("cert_file", path)?;
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let chain = chain.map_err(|error| bad(&format!("is damaged: {error}")))?;
    let Some(first) = chain.first() else { return Err(bad("holds no certificate")) };
    ParsedCertificate::try_from(first)
        .map_err(|error| bad(&format!("holds no usable certificate: {error}")))?;
    Ok(chain)
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, String> {
    let pem = read("key_file", path)?;
    PrivateKeyDer::from_pem_slice(&pem).map_err(|error| {
        // Never the text itself.
        let why = match error {
            rustls::pki_types::pem::Error::NoItemsFound
                if pem.windows(9).any(|word| word == b"ENCRYPTED") =>
            {
                "holds a key that is encrypted: take its passphrase away".to_owned()
            }
            rustls::pki_types::pem::Error::NoItemsFound => "holds no private key".to_owned(),
            error => format!("is damaged: {error}"),
        };
        format!("listen.tls.key_file {} {why}; it must hold a private key in PEM", path.display())
    })
}

fn mismatch(error: &rustls::Error, cert: &Path, key: &Path) -> String {
    let (cert, key) = (cert.display(), key.display());
    match error {
        rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
            format!("listen.tls: the key in {key} is not that of the first certificate in {cert}")
        }
        error => format!("listen.tls: {cert} and {key} cannot be used: {error}"),
    }
}

/// What is to be said of its dates.
fn expiry(
    chain: &[CertificateDer<'static>],
    provider: &CryptoProvider,
    now: SystemTime,
) -> Option<String> {
    let parsed = ParsedCertificate::try_from(chain.first()?).ok()?;
    let nobody = RootCertStore::empty();
    let at = |now: SystemTime| {
        let since = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let algorithms = provider.signature_verification_algorithms.all;
        let now = UnixTime::since_unix_epoch(since);
        // Dates are looked at before the issuer, which nobody here trusts.
        verify_server_cert_signed_by_trust_anchor(&parsed, &nobody, &[], now, algorithms).err()
    };
    let date = |time: UnixTime| {
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(time.as_secs());
        humantime::format_rfc3339_seconds(time)
    };
    let dated = |error| match error {
        rustls::Error::InvalidCertificate(error) => Some(error),
        _ => None,
    };
    match at(now).and_then(dated)? {
        CertificateError::ExpiredContext { not_after, .. } => {
            Some(format!("the certificate expired on {}: renew it", date(not_after)))
        }
        CertificateError::NotValidYetContext { not_before, .. } => {
            Some(format!("the certificate is not valid before {}", date(not_before)))
        }
        _ => match at(now + EXPIRES_SOON).and_then(dated)? {
            CertificateError::ExpiredContext { not_after, .. } => {
                Some(format!("the certificate expires on {}: renew it", date(not_after)))
            }
            _ => None,
        },
    }
}

/// What a connection to a port with TLS turned out to be.
#[derive(Debug)]
pub enum Opened {
    Tls(Box<TlsStream<TcpStream>>),
    /// It does not begin as TLS does: most likely a plain HTTP request.
    Plain(TcpStream),
}

/// Looks at the first byte, and shakes hands.
///
/// # Errors
/// The client left, was too slow, or does not accept the certificate.
pub async fn open(stream: TcpStream, config: Arc<ServerConfig>) -> io::Result<Opened> {
    let opening = async {
        let mut first = [0];
        if stream.peek(&mut first).await? == 1 && first[0] != HANDSHAKE_RECORD {
            return Ok(Opened::Plain(stream));
        }
        let stream = TlsAcceptor::from(config).accept(stream).await?;
        Ok(Opened::Tls(Box::new(stream)))
    };
    timeout(HANDSHAKE_MAX, opening).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use rcgen::{CertificateParams, KeyPair, date_time_ymd};

    use super::*;

    struct Dir(tempfile::TempDir);

    impl Dir {
        fn file(&self, name: &str, text: &str) -> PathBuf {
            let path = self.0.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        }

        /// A certificate that ends in `year`, and its key.
        fn pair(&self, name: &str, year: i32) -> TlsFiles {
            let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
            params.not_before = date_time_ymd(2020, 1, 1);
            params.not_after = date_time_ymd(year, 3, 4);
            let key = KeyPair::generate().unwrap();
            let cert = params.self_signed(&key).unwrap();
            TlsFiles {
                cert_file: self.file(&format!("{name}.pem"), &cert.pem()),
                key_file: self.file(&format!("{name}.key"), &key.serialize_pem()),
            }
        }
    }

    fn dir() -> Dir {
        Dir(tempfile::tempdir().unwrap())
    }

    #[test]
    fn a_good_pair_is_taken_and_its_dates_are_looked_at() {
        let dir = dir();
        let good = Certificate::load(&dir.pair("good", 2999)).unwrap();
        assert_eq!(good.warning, None);
        assert_eq!(good.config.alpn_protocols, [b"http/1.1"]);
        let old = Certificate::load(&dir.pair("old", 2021)).unwrap().warning.unwrap();
        assert!(old.contains("old.pem") && old.contains("expired on 2021-03-04"), "{old}");
    }

    #[test]
    fn one_that_soon_expires_is_told_with_its_date() {
        let dir = dir();
        let chain = chain(&dir.pair("a", 2021).cert_file).unwrap();
        let provider = rustls::crypto::ring::default_provider();
        let before = |days: u32| {
            humantime::parse_rfc3339("2021-03-04T00:00:00Z").unwrap() - days * 24 * HOUR
        };
        const HOUR: Duration = Duration::from_secs(3600);
        assert_eq!(expiry(&chain, &provider, before(8)), None);
        let soon = expiry(&chain, &provider, before(6)).unwrap();
        assert!(soon.contains("expires on 2021-03-04"), "{soon}");
        let early = expiry(&chain, &provider, before(9999)).unwrap();
        assert!(early.contains("not valid before 2020-01-01"), "{early}");
    }

    #[test]
    fn what_is_wrong_names_its_file() {
        let dir = dir();
        let (good, other) = (dir.pair("good", 2999), dir.pair("other", 2999));
        let bad = |cert: &PathBuf, key: &PathBuf| {
            let files = TlsFiles { cert_file: cert.clone(), key_file: key.clone() };
            Certificate::load(&files).unwrap_err()
        };
        let missing = dir.0.path().join("missing.pem");
        let empty = dir.file("empty.pem", "");
        let torn = dir.file("torn.pem", "-----BEGIN CERTIFICATE-----\nAAAA\n");
        let junk =
            dir.file("junk.pem", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n");
        let encrypted = dir.file(
            "locked.key",
            "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n",
        );
        for (cert, key, words) in [
            (&missing, &good.key_file, ["cert_file", "missing.pem cannot be read"]),
            (&good.cert_file, &missing, ["key_file", "missing.pem cannot be read"]),
            (&empty, &good.key_file, ["cert_file", "empty.pem holds no certificate"]),
            (&torn, &good.key_file, ["cert_file", "torn.pem is damaged"]),
            (&junk, &good.key_file, ["cert_file", "junk.pem holds no usable certificate"]),
            (&good.key_file, &good.key_file, ["cert_file", "good.key holds no certificate"]),
            (&good.cert_file, &good.cert_file, ["key_file", "good.pem holds no private key"]),
            (&good.cert_file, &encrypted, ["key_file", "locked.key holds a key that is encrypted"]),
            (&good.cert_file, &other.key_file, ["other.key", "is not that of"]),
        ] {
            let said = bad(cert, key);
            assert!(words.iter().all(|word| said.contains(word)), "{said}");
        }
    }
}
