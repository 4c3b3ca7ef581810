//! Whose certificate the client commands take: the one that Wharf itself is configured to show,
//! whatever name or date is in it, and else what this machine trusts.

use std::path::Path;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
};

/// `own`: the file of `listen.tls.cert_file`, where one is known. One that cannot be read counts for
/// nothing: Wharf may run elsewhere.
pub fn config(own: Option<&Path>) -> Result<ClientConfig, Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let pem = own.and_then(|path| std::fs::read(path).ok()).unwrap_or_default();
    let own = CertificateDer::pem_slice_iter(&pem).filter_map(Result::ok).collect();
    let verifier = Arc::new(OwnOrTrusted { own, provider: Arc::clone(&provider) });
    Ok(ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth())
}

#[derive(Debug)]
struct OwnOrTrusted {
    /// The server's own first, then those of its issuers.
    own: Vec<CertificateDer<'static>>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for OwnOrTrusted {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        // That it also has the key is proven by the handshake's signature.
        if self.own.first().is_some_and(|own| own == end_entity) {
            return Ok(ServerCertVerified::assertion());
        }
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        roots.add_parsable_certificates(self.own.iter().cloned());
        let provider = Arc::clone(&self.provider);
        let usual = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider).build();
        let Ok(usual) = usual else {
            return Err(Error::InvalidCertificate(CertificateError::UnknownIssuer));
        };
        usual.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// What is wrong with the other side's TLS, if that is what failed.
pub fn trouble(error: &(dyn std::error::Error + 'static)) -> Option<String> {
    use CertificateError as Bad;
    Some(match crate::runtime::tls_error(error)? {
        Error::InvalidCertificate(Bad::NotValidForNameContext { presented, .. }) => format!(
            "its certificate is for another name ({}): write that in --url",
            presented.join(", ")
        ),
        Error::InvalidCertificate(bad) => format!(
            "its certificate is not trusted here ({bad}): name its configuration with --config, its \
             file in WHARF_TLS_CERT_FILE, or the file of its issuer in SSL_CERT_FILE"
        ),
        Error::InvalidMessage(_) => "it does not speak TLS: is it http:// ?".to_owned(),
        other => format!("TLS failed: {other}"),
    })
}
