"""What people look at: Data Docs, shift reports, the evidence, and plots. Nothing that decides reads them back."""
