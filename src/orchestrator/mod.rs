//! The one owner of the scheduler, and what it hands to everyone else.

pub mod gate;
pub mod handle;
#[doc(hidden)]
pub mod puppet;
pub mod view;

pub use gate::{Gate, Lease, StartKind};
pub use handle::{Handle, RequestOptions, Waiting};
pub use view::View;
