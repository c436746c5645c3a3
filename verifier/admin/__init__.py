"""The owner's side of the verifier: documents, secrets, launches, evidence. No gRPC here (`verifier.admin_service`)."""
