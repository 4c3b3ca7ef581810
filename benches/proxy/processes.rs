//! The upstream and the two proxies before it, as processes of their own.

use std::fs::{self, File};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::load;
use super::wire::{self, Wanted};

/// From SIGTERM to SIGKILL.
const GRACE: Duration = Duration::from_secs(5);

/// A process of ours, ended with its owner.
pub struct Process {
    child: Child,
}

impl Process {
    fn spawn(command: &mut Command, log: &Path) -> io::Result<Process> {
        let log = File::create(log)?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        // In our process group, so that a Ctrl-C ends all.
        Ok(Process { child: command.spawn()? })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let pid = Pid::from_raw(self.child.id().cast_signed());
        let _ = kill(pid, Signal::SIGTERM);
        let until = Instant::now() + GRACE;
        while Instant::now() < until {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            thread::sleep(Duration::from_millis(5));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One that can be asked.
pub struct Server {
    /// Ends with this.
    _process: Process,
    /// JSON and bodies.
    pub address: SocketAddr,
    /// Streams: nginx has them unbuffered, on a port of its own.
    pub streams: SocketAddr,
    /// The process that does the work: nginx's is a child of what was started.
    pub worker: u32,
}

/// A loopback port that nobody has just now.
pub fn free_port() -> io::Result<SocketAddr> {
    TcpListener::bind("127.0.0.1:0")?.local_addr()
}

fn request(address: SocketAddr) -> Vec<u8> {
    let body = wire::body(Wanted::Json { bytes: wire::ANSWER_BYTES }, 0);
    wire::request(&address.to_string(), &body)
}

fn answering(process: Process, address: SocketAddr, streams: SocketAddr) -> io::Result<Server> {
    load::first_answer(address, &request(address), Instant::now())?;
    let worker = process.pid();
    Ok(Server { _process: process, address, streams, worker })
}

pub fn upstream(work: &Path) -> io::Result<Server> {
    let address = free_port()?;
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["upstream", &address.to_string()]);
    let process = Process::spawn(&mut command, &work.join("upstream.log"))?;
    answering(process, address, address)
}

pub fn nginx(work: &Path, upstream: SocketAddr) -> io::Result<Server> {
    let (address, streams) = (free_port()?, free_port()?);
    let folder = tempfile::tempdir_in(work)?.keep();
    let home = folder.display();
    let configuration = folder.join("nginx.conf");
    // One worker, as small installations have it; keep-alive on both sides; nothing goes to disk.
    fs::write(
        &configuration,
        format!(
            "daemon off;\nworker_processes 1;\nworker_rlimit_nofile 20000;\n\
             pid {home}/pid;\nerror_log {home}/error.log warn;\n\
             events {{ worker_connections 19000; }}\n\
             http {{\n access_log off;\n tcp_nodelay on;\n keepalive_requests 1000000000;\n\
             client_max_body_size 0;\n client_body_buffer_size 256k;\n\
             proxy_http_version 1.1;\n proxy_set_header Connection \"\";\n\
             proxy_set_header Host $host;\n proxy_max_temp_file_size 0;\n\
             client_body_temp_path {home}/body;\n proxy_temp_path {home}/proxy;\n\
             fastcgi_temp_path {home}/fastcgi;\n uwsgi_temp_path {home}/uwsgi;\n\
             scgi_temp_path {home}/scgi;\n\
             upstream engine {{ server {upstream}; keepalive 512; keepalive_requests 1000000000; }}\n\
             server {{ listen {address} backlog=4096; location / {{ proxy_pass http://engine; }} }}\n\
             server {{ listen {streams} backlog=4096; location / {{ proxy_buffering off;\n\
             proxy_pass http://engine; }} }}\n}}\n"
        ),
    )?;
    let mut command = Command::new("nginx");
    command.arg("-c").arg(&configuration).arg("-e").arg(folder.join("error.log"));
    let process = Process::spawn(&mut command, &folder.join("log"))?;
    let mut server = answering(process, address, streams)?;
    server.worker = child_of(server.worker).unwrap_or(server.worker);
    Ok(server)
}

/// nginx's worker: as root it runs as another user, and so is not in our own list of children.
fn child_of(parent: u32) -> Option<u32> {
    let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).ok()?;
    children.split_whitespace().next()?.parse().ok()
}

/// One model that is this upstream, and others that are never started.
pub fn models_yaml(upstream: SocketAddr, models: usize) -> String {
    let others = (1..models).map(|number| {
        let vram = 4 + number % 40;
        format!(
            "  model-{number:03}: {{ engine: llamacpp, vram: {vram}GiB, \
             process: {{ cmd: \"llama-server -m {number}.gguf --port ${{PORT}}\" }} }}\n"
        )
    });
    format!(
        "gpu: {{ provider: simulated, memory: [80GiB, 80GiB, 80GiB, 80GiB] }}\nmodels:\n  \
         bench: {{ engine: openai, external: {{ url: \"http://{upstream}\" }} }}\n{}",
        others.collect::<String>()
    )
}

/// `wharf serve` with `models` models; requests go to the one that is this upstream.
pub struct Wharf<'a> {
    pub binary: &'a Path,
    pub work: &'a Path,
    pub upstream: SocketAddr,
    pub models: usize,
}

impl Wharf<'_> {
    /// Started, and not waited for.
    fn spawn(&self) -> io::Result<Server> {
        let (address, control) = (free_port()?, free_port()?);
        let folder = tempfile::tempdir_in(self.work)?.keep();
        let text = format!(
            "listen: {{ gateway: \"{address}\", orchestrator: \"{control}\" }}\n\
             store: {}/wharf.db\n{}",
            folder.display(),
            models_yaml(self.upstream, self.models)
        );
        fs::write(folder.join("models.yaml"), text)?;
        let mut command = Command::new(self.binary);
        command.arg("serve").arg("--config").arg(folder.join("models.yaml"));
        // No variable of the caller's environment may mean another Wharf.
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("WHARF_") {
                command.env_remove(name);
            }
        }
        let process = Process::spawn(&mut command, &folder.join("log"))?;
        let worker = process.pid();
        Ok(Server { _process: process, address, streams: address, worker })
    }

    pub fn start(&self) -> io::Result<Server> {
        let server = self.spawn()?;
        load::first_answer(server.address, &request(server.address), Instant::now())?;
        Ok(server)
    }

    /// From the start of the process: until `/health` answers 200, and until the first request
    /// has its answer.
    pub fn start_up(&self) -> io::Result<(Duration, Duration)> {
        let began = Instant::now();
        let server = self.spawn()?;
        let health =
            format!("GET /health HTTP/1.1\r\nhost: {}\r\n\r\n", server.address).into_bytes();
        let healthy = load::first_answer(server.address, &health, began)?;
        let answered = load::first_answer(server.address, &request(server.address), began)?;
        Ok((healthy, answered))
    }
}

/// Resident memory in KiB.
pub fn resident(pid: u32) -> io::Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.ok_or_else(|| io::Error::other(format!("/proc/{pid}/status has no VmRSS")))
}

/// CPU time that it has used, in microseconds, counted in hundredths of a second.
pub fn busy(pid: u32) -> io::Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // Behind its name, which may hold anything: the 14th and 15th field of all.
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
    let ticks = fields.split_whitespace().skip(11).take(2).filter_map(|n| n.parse::<f64>().ok());
    Ok(ticks.sum::<f64>() * 10_000.0)
}

/// CPU time of all threads in nanoseconds, for those that use next to none.
pub fn cpu_time(pid: u32) -> io::Result<u64> {
    let mut sum = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = fs::read_to_string(task?.path().join("schedstat"))?;
        sum += text.split(' ').next().and_then(|ns| ns.parse::<u64>().ok()).unwrap_or_default();
    }
    Ok(sum)
}
